"""What runs on several processes: a list of cases, one entry each."""

from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = 12
CORRECTED = {"enable_adacorrection": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a cached model under xfuser, beside the same run in one process."""

    family: str
    """``flux1`` (splits its inputs), ``flux-pipeline`` (legacy wrapper), ``opensora``, ..."""
    cache: dict[str, Any]
    """Options of `CacheConfig`."""
    degrees: dict[str, Any]
    """Options of `Degrees`; their product is the number of processes."""
    scenario: str = "run"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the scenario's sampler: tokens, guidance, ..."""
    exact: bool = True
    """Whether the parallel engine computes what one process does, up to rounding."""

    @property
    def world_size(self) -> int:
        size = 2 if self.degrees.get("use_cfg_parallel") else 1
        for name, degree in self.degrees.items():
            size *= 1 if name == "use_cfg_parallel" else degree
        return size

    @property
    def name(self) -> str:
        corrected = "+AdaCorrection" if self.cache.get("enable_adacorrection") else ""
        degrees = "x".join(f"{key.split('_')[0]}{value:d}" for key, value in self.degrees.items())
        options = "".join(f"-{key}{value}" for key, value in self.options.items())
        knobs = ("rel_l1_thresh", "adacorr_tolerance", "target_compute")
        threshold = next(self.cache[knob] for knob in knobs if knob in self.cache)
        method = f"{self.cache['use_cache']}{threshold:g}{corrected}"
        return f"{self.family}-{method}-{degrees}-{self.scenario}{options}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


FB = {"use_cache": "Fb", "rel_l1_thresh": 0.5}
TEA = {"use_cache": "Tea", "rel_l1_thresh": 0.25}
FAST = {"use_cache": "Fast", "rel_l1_thresh": 0.1}
AUTO = {"use_cache": "Auto", "adacorr_tolerance": 0.02}
ADA = {"use_cache": "Ada", "rel_l1_thresh": 1.0, "codebook": ((0.05, 3), (0.5, 2))}
LEARNED = {"use_cache": "Learned", "target_compute": 0.4}
"""With a plan that each rank fits for itself."""
PLAIN = (FB, TEA, FAST, ADA)
METHODS = (*PLAIN, AUTO, *(method | CORRECTED for method in PLAIN))

ULYSSES = {"ulysses_degree": 2}
CFG = {"use_cfg_parallel": True}
DATA = {"data_parallel_degree": 2}
STAGES = {"pipefusion_parallel_degree": 2}
NEVER_REUSE = {"use_cache": "Tea", "rel_l1_thresh": 0.0}


def case(family: str, cache: dict, degrees: dict, scenario: str = "run", **options: Any) -> Case:
    exact = options.pop("exact", True)
    return Case(
        family=family,
        cache=cache,
        degrees=degrees,
        scenario=scenario,
        options=options,
        exact=exact,
    )


CASES = [
    # Every method, tokens split inside the transformer.
    *(case("flux1", method, ULYSSES) for method in METHODS),
    case("flux1", TEA | CORRECTED, ULYSSES, guidance=2.0),
    # 25 image tokens on 2 ranks; the reference pads as xfuser does.
    case("flux1", TEA, ULYSSES, grid=5),
    case("flux1", AUTO, ULYSSES, grid=5),
    # Branches of a guided batch on different ranks.
    *(case("flux1", method, CFG, batch=2) for method in (FB, AUTO, TEA | CORRECTED)),
    *(case("branches", method, CFG) for method in (TEA, AUTO, TEA | CORRECTED)),
    # Replicas decide by themselves.
    *(case("flux1", method, DATA, "replicas") for method in (AUTO, FB | CORRECTED)),
    # State of earlier runs.
    case("flux1", FB, ULYSSES, "interrupted"),
    case("flux1", AUTO, ULYSSES, "interrupted"),
    case("flux1", TEA, ULYSSES, "shapes"),
    case("flux1", AUTO, ULYSSES, "shapes"),
    # xfuser's own pipeline: latents split before the transformer, a scheduler of its own.
    *(case("flux-pipeline", method, ULYSSES) for method in (FAST, AUTO, FB | CORRECTED)),
    *(case(f"{name}-pipeline", LEARNED, ULYSSES) for name in ("flux", "pixart")),
    case("pixart-pipeline", LEARNED, CFG),
    # Plans: followed, fitted together, learned; latents whole on each rank, in parts, of replicas.
    case("split-flux", LEARNED, ULYSSES),
    case("split-flux", LEARNED, DATA, "replicas"),
    *(
        case(family, LEARNED, degrees, scenario)
        for scenario in ("silent", "calibrated", "learned")
        for family, degrees in (
            ("split-flux", ULYSSES),
            ("legacy-flux", ULYSSES),
            ("legacy-pixart", CFG),
            ("split-flux", DATA),
        )
    ),
    # Stages: all warm-up steps (the engine is exact), then patches with a stale context.
    *(case("flux-pipeline", method, STAGES) for method in (FB, TEA)),
    case("flux-pipeline", FAST, STAGES, exact=False),  # each stage decides for its own blocks
    case("flux-pipeline", TEA, STAGES, patches=2, exact=False),
    case("flux-pipeline", NEVER_REUSE, STAGES, patches=2, exact=False),
    *(case("flux-pipeline", method, STAGES) for method in (AUTO, FB | CORRECTED, FAST | CORRECTED)),
    case("flux-pipeline", AUTO, STAGES, "interrupted"),
    case("flux-pipeline", TEA | CORRECTED, STAGES, "shapes"),
    case("flux-pipeline", AUTO, STAGES, patches=2, exact=False),
    case("flux-pipeline", FB | CORRECTED, STAGES, patches=2, exact=False),
    case("trained", TEA, STAGES, "faithful"),
    # Rows of the latents, or branches, given to the wrapper.
    *(case("pixart-pipeline", method, ULYSSES) for method in (TEA, AUTO)),
    *(case("pixart-pipeline", method, CFG) for method in (FB, AUTO)),
    *(case("pixart-pipeline", method, STAGES) for method in (TEA, AUTO)),
    case("pixart-pipeline", TEA | CORRECTED, STAGES, patches=2, exact=False),
    # Sequence parallelism of this package's own model.
    *(case("opensora", method, ULYSSES) for method in (FB, TEA, AUTO, FAST | CORRECTED)),
    case("opensora", TEA, ULYSSES, width=5),
    # Ranks that disagree raise, all of them alike.
    case("flux1", AUTO, ULYSSES, "perturbed"),
    case("flux1", TEA, ULYSSES, "misconfigured"),
    # Four processes.
    case("flux1", TEA | CORRECTED, ULYSSES | CFG, batch=2),
    case("flux1", FAST, ULYSSES | CFG, batch=2),
    case("flux1", FB, ULYSSES | DATA, "replicas"),
    # Here xfuser repeats the text on every rank, so its result is not that of one process.
    case("flux-pipeline", TEA, STAGES | ULYSSES, exact=False),
    case("flux-pipeline", AUTO, STAGES | ULYSSES, patches=2, exact=False),
    case("flux-pipeline", AUTO, STAGES | ULYSSES, "misconfigured", exact=False),
]
