"""What a run depends on: every option with its help and its check, and what follows from them."""

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.names import ACCEPTED_METHODS, CORRECTED, METHOD_NAMES, TARGETS, expanded
from benchmark.options import (
    SHARE,
    Check,
    above,
    at_least,
    check_options,
    number,
    one_of,
    option,
    whole,
)
from benchmark.peers import check, is_peer

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = ROOT / "benchmark" / "pipelines"
PATHS = ("model", "prompts", "judge", "config", "inception_weights", "lpips_weights")
DEGREES = ("ulysses_degree", "ring_degree", "pipefusion_parallel_degree", "data_parallel_degree")
MODES = {"sweep": "sweep", "gamma_lambda_study": "gamma_lambda"}
"""Flag -> what is made in place of the comparison."""

_METHOD = Check(
    lambda name: name in (*ACCEPTED_METHODS, "Auto" + CORRECTED),
    f"the name of a cache method; accepted: {', '.join(ACCEPTED_METHODS)}",
)
_PIXELS = Check(lambda value: value >= 16 and value % 16 == 0, "a multiple of 16 pixels")
_CACHE = "cache options (each wins over the file)"
_QUALITY = "prompts and quality"
_MACHINE = "latency and machine"
_DEVICES = "several devices, under torchrun (names are xfuser's)"
_OUTPUT = "output"


def _by_family(name: str) -> str:
    values = {family: getattr(entry, name) for family, entry in FAMILIES.items()}
    return ", ".join(f"{family} {value:g}" for family, value in values.items() if value is not None)


def _degree(meaning: str) -> Any:
    return whole(meaning, 1, group=_DEVICES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything a run depends on; what is None is filled in with the family's usual value.

    Raises:
        BenchmarkError: an option is wrong, or the family or another option excludes it.
    """

    mode: str = option("another study in place of the comparison", "comparison", flags=MODES)
    model_type: str = option("model family", "flux", check=one_of(sorted(FAMILIES)))
    model: str | None = option(
        "diffusers directory or hub id", shown="the small pipeline of the family"
    )
    cache_methods: tuple[str, ...] = option(
        f"any of {', '.join(ACCEPTED_METHODS)}",
        tuple(name for name in METHOD_NAMES if not name.endswith(CORRECTED)),
        check=_METHOD,
        many=True,
    )
    num_inference_steps: tuple[int, ...] | None = whole(
        "sampling steps, one or more values", least=4, many=True, shown=_by_family("steps")
    )
    height: int | None = option("pixels", read=int, check=_PIXELS, shown="the pipeline's own")
    width: int | None = option("pixels", read=int, check=_PIXELS, shown="the pipeline's own")
    num_frames: int | None = whole("frames of a clip", least=2, shown=_by_family("num_frames"))
    guidance_scale: float | None = number(
        "classifier-free guidance in a doubled batch, above 1",
        None,
        at_least(1),
        shown=_by_family("guidance_scale"),
    )
    true_cfg_scale: float = number(
        "FLUX's classifier-free guidance; above 1 adds a call a step", 1.0, at_least(1)
    )

    config: str | None = option(
        "YAML with each method's options", shown="configs/FAMILY.yaml", group=_CACHE
    )
    enable_adacorrection: bool = option(
        "add the corrected variant of every base method listed", False, group=_CACHE
    )
    rel_l1_thresh: float | None = number(
        "threshold of the base methods", None, at_least(0), group=_CACHE
    )
    adacorr_gamma: float | None = number(
        "strength of the correction", None, at_least(0), shown="1", group=_CACHE
    )
    adacorr_lambda: float | None = number(
        "weight of the spatial term", None, at_least(0), shown="1", group=_CACHE
    )
    adacorr_tolerance: float | None = number(
        "tolerated relative error", None, above(0), group=_CACHE
    )
    adacorr_mode: str | None = option(
        "adaptive saves compute, literal is the published per-layer blend",
        check=one_of(("adaptive", "literal")),
        shown="adaptive",
        group=_CACHE,
    )
    target_compute: float | None = number(
        "share of the computed calls to hold", None, SHARE, group=_CACHE
    )
    target_speedup: float | None = number("its inverse", None, at_least(1), group=_CACHE)
    schedule: tuple[int, ...] | None = whole(
        "Schedule: one number N for every N-th step, or the indices of the computed steps",
        least=0,
        many=True,
        group=_CACHE,
    )
    stand_in: str | None = option(
        "Schedule without AdaCorrection: what stands in for a skipped call",
        check=one_of(("reuse", "forecast")),
        shown="reuse",
        group=_CACHE,
    )
    calibration: str | None = option("Schedule: the file of a stored one", group=_CACHE)
    schedule_interpolation: bool = option(
        "Schedule: place a stored one by noise level in a run with other steps", False, group=_CACHE
    )

    split: str = option(
        "prompt split", "test", check=one_of(("development", "test")), group=_QUALITY
    )
    num_prompts: int | None = whole(
        "the first N prompts of the split", shown="12, or all if there are fewer", group=_QUALITY
    )
    prompts: str | None = option(
        "JSON with the splits", shown="benchmark/prompts/FAMILY.json", group=_QUALITY
    )
    judge: str | None = option(
        "folder of the small classifier", shown="benchmark/pipelines/judge", group=_QUALITY
    )
    ode_reference: bool = option(
        "also compare with the converged solution of the sampling ODE (always in --sweep)",
        False,
        group=_QUALITY,
    )
    inception_weights: str | None = option(
        "Inception weights: FID instead of the judge's distance (extra: inception)", group=_QUALITY
    )
    lpips_weights: str | None = option(
        "state dict of LPIPS with AlexNet: adds LPIPS", group=_QUALITY
    )

    repetitions: int = whole("timed rounds", 3, group=_MACHINE)
    warmup: int = whole("untimed rounds", 1, least=0, group=_MACHINE)
    device: str | None = option(
        "torch device", shown="cuda if there is one, else cpu", group=_MACHINE
    )
    dtype: str = option(
        "weights' type", "float32", check=one_of(("float32", "bfloat16", "float16")), group=_MACHINE
    )
    threads: int | None = whole("CPU threads of each process", group=_MACHINE)
    workers: int = whole(
        "processes that make pictures, one thread each by default if above 1", 1, group=_MACHINE
    )

    ulysses_degree: int = _degree("ranks that share the heads")
    ring_degree: int = _degree("ranks that share the keys")
    pipefusion_parallel_degree: int = _degree("stages of blocks")
    data_parallel_degree: int = _degree("replicas")
    use_cfg_parallel: bool = option("a branch on each half", False, group=_DEVICES)

    output_dir: Path | None = option(
        "new or empty", read=Path, shown="adacorr-results/FAMILY-NUMBER", group=_OUTPUT
    )
    resume: bool = option("go on with an interrupted run", False, group=_OUTPUT)

    def __post_init__(self) -> None:
        check_options(self)
        self._check_targets()
        self._settle_by_family()
        self._check_degrees()
        self._fill(cache_methods=expanded(self.cache_methods, self.enable_adacorrection))
        self._check_peers()
        steps = tuple(dict.fromkeys(self.num_inference_steps))
        self._fill(num_inference_steps=steps, ode_reference=self.mode == "sweep")
        if self.output_dir is None:
            parent = Path.cwd() / "adacorr-results"
            self._fill(output_dir=default_output_dir(parent, self.model_type, self.resume))

    def _fill(self, **values: Any) -> None:
        """Set what is not given, or follows from what is."""
        for name, value in values.items():
            object.__setattr__(self, name, value or getattr(self, name))

    @property
    def cache_options(self) -> dict[str, Any]:
        """Options of the cache that were given; they win over the configuration file."""
        named = {name: getattr(self, name) for name in CACHE_OPTIONS}
        given = {n: v for n, v in named.items() if v is not None and v is not False}
        if self.schedule is not None and len(self.schedule) == 1:
            given["schedule"] = self.schedule[0]
        return given

    @property
    def degrees(self) -> dict[str, Any]:
        """How the devices share the work, by xfuser's names; empty in one process."""
        named = {name: getattr(self, name) for name in (*DEGREES, "use_cfg_parallel")}
        return named if _processes() > 1 else {}

    def to_dict(self) -> dict[str, Any]:
        """For the results, wherever they lie; paths inside the repository are relative to it."""
        apart = ("output_dir", "enable_adacorrection", "use_cfg_parallel", *DEGREES, *CACHE_OPTIONS)
        content = {name: value for name, value in asdict(self).items() if name not in apart}
        for name in PATHS:
            content[name] = content[name] and _relative(content[name])
        return {**content, "cache_options": self.cache_options, "degrees": self.degrees}

    def _check_targets(self) -> None:
        targets = [name for name in (*TARGETS, "adacorr_tolerance") if getattr(self, name)]
        if len(targets) > 1:
            raise BenchmarkError(f"--{targets[0]} and --{targets[1]}: choose one of them")
        if self.mode == "sweep" and targets:
            raise BenchmarkError(f"--{targets[0]}: a sweep tries tolerances of its own: leave it")
        for name in ("adacorr_gamma", "adacorr_lambda"):
            if self.mode == "gamma_lambda" and getattr(self, name) is not None:
                raise BenchmarkError(f"--{name} is what --gamma_lambda_study varies: leave it")

    def _settle_by_family(self) -> None:
        """Fill in the family's values; `BenchmarkError` for what it does not have."""
        name, family = self.model_type, FAMILIES[self.model_type]
        for each in ("guidance_scale", "num_frames"):
            if getattr(self, each) is not None and getattr(family, each) is None:
                accepted = [other for other, f in FAMILIES.items() if getattr(f, each) is not None]
                raise BenchmarkError(f"--{each}: {name} has none; it is for {', '.join(accepted)}")
        if self.true_cfg_scale > 1 and family.guidance_scale is not None:
            raise BenchmarkError(f"--true_cfg_scale: {name} takes --guidance_scale")
        for each in ("height", "width"):
            if getattr(self, each) is not None and family.fixed_size:
                raise BenchmarkError(f"--{each}: {name} makes pictures of its own size alone")
        if self.inception_weights and family.num_frames is not None:
            raise BenchmarkError(f"--inception_weights: it is for pictures, {name} makes clips")
        usual = {
            "guidance_scale": family.guidance_scale,
            "num_frames": family.num_frames,
            "num_inference_steps": (family.steps,),
            "model": str(PIPELINES / name),
            "prompts": str(ROOT / "benchmark" / "prompts" / f"{name}.json"),
            "judge": str(PIPELINES / family.judge),
            "config": str(ROOT / "configs" / f"{name}.yaml"),
        }
        self._fill(**{each: getattr(self, each) or value for each, value in usual.items()})

    def _check_degrees(self) -> None:
        needed = 2 if self.use_cfg_parallel else 1
        for name in DEGREES:
            needed *= getattr(self, name)
        if needed != _processes():
            raise BenchmarkError(
                f"the parallel degrees need {needed} processes, but there are {_processes()}: "
                f"start it with torchrun --nproc_per_node {needed}, or change the degrees"
            )
        if needed > 1 and self.workers > 1:
            raise BenchmarkError("--workers: leave it at 1 under torchrun")

    def _check_peers(self) -> None:
        """`BenchmarkError` for a method of another project that cannot run here."""
        for name in filter(is_peer, self.cache_methods):
            if self.degrees:
                raise BenchmarkError(f"--cache_methods: {name} is run in one process, not several")
            try:
                check(name, self.model_type, true_cfg=self.true_cfg_scale > 1)
            except BenchmarkError as error:
                raise BenchmarkError(f"--cache_methods: {error}") from error


NAMES = tuple(each.name for each in fields(Settings))
CACHE_OPTIONS = tuple(
    each.name
    for each in fields(Settings)
    if each.metadata["group"] == _CACHE and each.name not in ("config", "enable_adacorrection")
)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _relative(path: str) -> str:
    absolute = Path(path).expanduser().absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else path


def default_output_dir(parent: Path, family: str, resume: bool) -> Path:
    """The next free ``FAMILY-NUMBER`` below `parent`, or to resume the newest one there."""
    taken = [re.fullmatch(rf"{family}-(\d+)", path.name) for path in parent.glob(f"{family}-*")]
    newest = max((int(match[1]) for match in taken if match), default=0)
    if resume and not newest:
        raise BenchmarkError(f"--resume: there is no run to resume in {parent}")
    return parent / f"{family}-{newest if resume else newest + 1:03d}"
