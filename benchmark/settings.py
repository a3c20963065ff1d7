"""The benchmark's command line, checked and resolved into one record."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmark.arguments import DEGREES, make_parser
from benchmark.errors import BenchmarkError
from benchmark.families import FAMILIES
from benchmark.method_names import CORRECTED, SCHEDULE_OPTIONS, UNCACHED
from benchmark.peers import check, is_peer
from xfuser_adacorr.config import TARGETS

ROOT = Path(__file__).resolve().parent.parent
CACHE_OPTIONS = (
    *SCHEDULE_OPTIONS,
    "rel_l1_thresh",
    "adacorr_gamma",
    "adacorr_lambda",
    "adacorr_tolerance",
    "adacorr_mode",
    *TARGETS,
)
PATHS = (
    "model",
    "prompts",
    "judge",
    "config",
    "inception_weights",
    "lpips_weights",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything a run depends on."""

    mode: str
    """``comparison``, ``sweep``, ``gamma_lambda`` or ``pareto``."""
    model_type: str
    model: str
    prompts: str
    judge: str
    config: str
    cache_methods: tuple[str, ...]
    cache_options: dict[str, Any]
    """Options of the cache given on the command line; they win over the configuration file."""
    num_inference_steps: tuple[int, ...]
    split: str
    num_prompts: int | None
    height: int | None
    width: int | None
    true_cfg_scale: float
    ode_reference: bool
    inception_weights: str | None
    lpips_weights: str | None
    repetitions: int
    warmup: int
    device: str | None
    dtype: str
    threads: int | None
    workers: int
    output_dir: Path
    resume: bool
    degrees: dict[str, Any] = field(default_factory=dict)
    """How the devices share the work, by xfuser's names; empty in one process."""
    guidance_scale: float | None = None
    """Of classifier-free guidance in a doubled batch; None for families without it."""
    num_frames: int | None = None
    """Of a clip; None for families of pictures."""

    def to_dict(self) -> dict[str, Any]:
        """For the results, wherever they lie; paths inside the repository are relative to it."""
        content = asdict(self)
        del content["output_dir"]
        for name in PATHS:
            content[name] = content[name] and _relative(content[name])
        return content


def _relative(path: str) -> str:
    absolute = Path(path).expanduser().absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else path


def read_settings(argv: Sequence[str]) -> Settings:
    """Parse the command line; raises `BenchmarkError` for what is wrong in it."""
    given = vars(make_parser().parse_args(argv))
    if given["sweep"] and given["gamma_lambda_study"]:
        raise BenchmarkError("--sweep and --gamma_lambda_study: choose one of them")
    options = {name: given.pop(name) for name in CACHE_OPTIONS if name in given}
    if "schedule" in options:
        listed = options["schedule"]
        options["schedule"] = listed[0] if len(listed) == 1 else tuple(listed)
    targets = [name for name in (*TARGETS, "adacorr_tolerance") if name in options]
    if len(targets) > 1:
        raise BenchmarkError(f"--{targets[0]} and --{targets[1]}: choose one of them")
    mode = "sweep" if given.pop("sweep") else "comparison"
    if mode == "sweep" and targets:
        raise BenchmarkError(f"--{targets[0]}: a sweep tries tolerances of its own: leave it")
    if given.pop("gamma_lambda_study"):
        mode = "gamma_lambda"
        clashing = sorted({"adacorr_gamma", "adacorr_lambda"} & set(options))
        if clashing:
            raise BenchmarkError(f"--{clashing[0]} is what --gamma_lambda_study varies: leave it")
    family = given["model_type"]
    _settle_by_family(given)
    given["model"] = given["model"] or str(ROOT / "benchmark" / "pipelines" / family)
    given["prompts"] = given["prompts"] or str(ROOT / "benchmark" / "prompts" / f"{family}.json")
    given["judge"] = given["judge"] or str(
        ROOT / "benchmark" / "pipelines" / FAMILIES[family].judge
    )
    given["config"] = given["config"] or str(ROOT / "configs" / f"{family}.yaml")
    given["cache_methods"] = _expand_methods(
        given["cache_methods"], corrected=given.pop("enable_adacorrection")
    )
    given["num_inference_steps"] = tuple(dict.fromkeys(given["num_inference_steps"]))
    given["degrees"] = _read_degrees(given)
    _check_peers(given)
    given["ode_reference"] = given["ode_reference"] or mode == "sweep"
    directory = given.pop("output_dir")
    if directory is None:
        directory = default_output_dir(Path.cwd() / "adacorr-results", family, given["resume"])
    return Settings(mode=mode, cache_options=options, output_dir=Path(directory), **given)


def _settle_by_family(given: dict[str, Any]) -> None:
    """Fill in the family's defaults; `BenchmarkError` for what it does not have."""
    name = given["model_type"]
    family = FAMILIES[name]
    for option in ("guidance_scale", "num_frames"):
        if given[option] is None:
            given[option] = getattr(family, option)
        elif getattr(family, option) is None:
            accepted = [other for other, f in FAMILIES.items() if getattr(f, option) is not None]
            raise BenchmarkError(f"--{option}: {name} has none; it is for {', '.join(accepted)}")
    if given["true_cfg_scale"] > 1 and family.guidance_scale is not None:
        raise BenchmarkError(f"--true_cfg_scale: {name} takes --guidance_scale")
    for option in ("height", "width"):
        if given[option] is not None and family.fixed_size:
            raise BenchmarkError(f"--{option}: {name} makes pictures of its own size alone")
    if given["inception_weights"] and family.num_frames is not None:
        raise BenchmarkError(f"--inception_weights: it is for pictures, {name} makes clips")
    given["num_inference_steps"] = given["num_inference_steps"] or [family.steps]


def _check_peers(given: dict[str, Any]) -> None:
    """`BenchmarkError` for a method of another project that cannot run here."""
    for name in filter(is_peer, given["cache_methods"]):
        if given["degrees"]:
            raise BenchmarkError(f"--cache_methods: {name} is run in one process, not by torchrun")
        try:
            check(name, given["model_type"], true_cfg=given["true_cfg_scale"] > 1)
        except BenchmarkError as error:
            raise BenchmarkError(f"--cache_methods: {error}") from error


def _read_degrees(given: dict[str, Any]) -> dict[str, Any]:
    """Take the parallel degrees out of the arguments; empty for one process."""
    degrees = {name: given.pop(name) for name in (*DEGREES, "use_cfg_parallel")}
    needed = 2 if degrees["use_cfg_parallel"] else 1
    for name in DEGREES:
        needed *= degrees[name]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if needed != processes:
        raise BenchmarkError(
            f"the parallel degrees need {needed} processes, but there are {processes}: "
            f"start it with torchrun --nproc_per_node {needed}, or change the degrees"
        )
    if processes > 1 and given["workers"] > 1:
        raise BenchmarkError("--workers: leave it at 1 under torchrun")
    return degrees if processes > 1 else {}


def _expand_methods(methods: Sequence[str], *, corrected: bool) -> tuple[str, ...]:
    """Without repetitions; with each base method's corrected variant right after it."""
    expanded = []
    for method in methods:
        expanded.append(method)
        alone = method in (UNCACHED, "Auto") or is_peer(method)
        if corrected and not alone and not method.endswith(CORRECTED):
            expanded.append(method + CORRECTED)
    return tuple(dict.fromkeys(expanded))


def default_output_dir(parent: Path, family: str, resume: bool) -> Path:
    """The next free ``FAMILY-NUMBER`` below `parent`, or to resume the newest one there."""
    taken = [re.fullmatch(rf"{family}-(\d+)", path.name) for path in parent.glob(f"{family}-*")]
    newest = max((int(match[1]) for match in taken if match), default=0)
    if resume and not newest:
        raise BenchmarkError(f"--resume: there is no run to resume in {parent}")
    return parent / f"{family}-{newest if resume else newest + 1:03d}"
