"""The benchmark's command line, checked and resolved into one record."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmark.errors import BenchmarkError
from benchmark.families import FAMILIES
from benchmark.peers import PEERS, check, is_peer
from xfuser_adacorr import METHODS
from xfuser_adacorr.config import STAND_INS, TARGETS

ROOT = Path(__file__).resolve().parent.parent
CORRECTED = "+AdaCorrection"
UNCACHED = "None"
METHOD_NAMES = (UNCACHED, *METHODS, *(m + CORRECTED for m in METHODS if m != "Auto"))
SCHEDULE = "Schedule"
SCHEDULES = (SCHEDULE, SCHEDULE + CORRECTED)
"""Methods that are told the computed steps; a run does not take them unless they are named."""
ACCEPTED_METHODS = (*METHOD_NAMES, *SCHEDULES, *PEERS)
SCHEDULE_OPTIONS = ("schedule", "stand_in", "schedule_interpolation", "calibration")
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
    "output_dir",
)


DEGREES = (
    "ulysses_degree",
    "ring_degree",
    "pipefusion_parallel_degree",
    "data_parallel_degree",
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
        """For the results; paths inside the repository are relative to it."""
        content = {**asdict(self), "output_dir": str(self.output_dir)}
        for name in PATHS:
            content[name] = content[name] and _relative(content[name])
        return content


def _relative(path: str) -> str:
    absolute = Path(path).expanduser().absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else path


class Parser(argparse.ArgumentParser):
    """Raises `BenchmarkError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(message)


def _number(convert: Callable[[str], Any], least: float, *, above: bool = False) -> Callable:
    wanted = f"a number {'above' if above else 'of at least'} {least}"
    if convert is int:
        wanted = f"a whole number of at least {least}"

    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None
        if not least <= value < float("inf") or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return check


def _picture_size(text: str) -> int:
    value = _number(int, 16)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"must be a multiple of 16 pixels, got {value}")
    return value


def _share(text: str) -> float:
    value = _number(float, 0, above=True)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a share of at most 1, got {text}")
    return value


def _method(text: str) -> str:
    name = "Auto" if text == "Auto" + CORRECTED else text
    if name not in ACCEPTED_METHODS:
        raise argparse.ArgumentTypeError(
            f"unknown cache method {text!r}; accepted: {', '.join(ACCEPTED_METHODS)}"
        )
    return name


def _by_family(name: str) -> str:
    values = {family: getattr(entry, name) for family, entry in FAMILIES.items()}
    return ", ".join(f"{family} {value:g}" for family, value in values.items() if value is not None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cache_execute.py",
        description="Compare cache methods with the uncached pipeline and with fewer steps.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is run").add_argument
    add("--model_type", choices=sorted(FAMILIES), default="flux", help="model family (flux)")
    add("--model", help="diffusers directory or hub id (the small pipeline of the family)")
    add(
        "--cache_methods",
        nargs="+",
        type=_method,
        metavar="METHOD",
        default=[UNCACHED, *METHODS],
        help=f"any of {', '.join(ACCEPTED_METHODS)} (None and every base method)",
    )
    add(
        "--num_inference_steps",
        nargs="+",
        type=_number(int, 4),
        metavar="N",
        help=f"sampling steps, one or more values, each at least 4 ({_by_family('steps')})",
    )
    add("--height", type=_picture_size, metavar="H", help="pixels (the pipeline's own size)")
    add("--width", type=_picture_size, metavar="W", help="pixels (the pipeline's own size)")
    add(
        "--num_frames",
        type=_number(int, 2),
        metavar="N",
        help=f"frames of a clip ({_by_family('num_frames')})",
    )
    add(
        "--guidance_scale",
        type=_number(float, 1),
        metavar="S",
        help="classifier-free guidance of the families that batch it; above 1 doubles the batch "
        f"({_by_family('guidance_scale')})",
    )
    add(
        "--true_cfg_scale",
        type=_number(float, 1),
        default=1.0,
        metavar="S",
        help="FLUX's classifier-free guidance; above 1 adds a call a step (1)",
    )

    add = parser.add_argument_group("cache options (each wins over the file)").add_argument
    add("--config", metavar="FILE", help="YAML with each method's options (configs/FAMILY.yaml)")
    add(
        "--enable_adacorrection",
        action="store_true",
        help="add the corrected variant of every base method listed",
    )
    given = {"default": argparse.SUPPRESS, "metavar": "X"}
    least_0, above_0 = _number(float, 0), _number(float, 0, above=True)
    least_1 = _number(float, 1)
    add("--rel_l1_thresh", type=least_0, help="threshold of the base methods, >= 0", **given)
    add("--adacorr_gamma", type=least_0, help="strength of the correction, >= 0 (1)", **given)
    add("--adacorr_lambda", type=least_0, help="weight of the spatial term, >= 0 (1)", **given)
    add("--adacorr_tolerance", type=above_0, help="tolerated relative error, > 0", **given)
    add("--target_compute", type=_share, help="compute fraction to hold, up to 1", **given)
    add("--target_speedup", type=least_1, help="its inverse: counted compute, >= 1", **given)
    add("--target_psnr", type=above_0, help="PSNR in dB to expect, > 0", **given)
    add(
        "--schedule",
        type=_number(int, 0),
        help="Schedule: one number N for every N-th step, or the indices of the computed steps",
        **{**given, "nargs": "+", "metavar": "N"},
    )
    add(
        "--stand_in",
        choices=STAND_INS,
        default=argparse.SUPPRESS,
        help="Schedule without AdaCorrection: what stands in for a skipped call (reuse)",
    )
    add("--calibration", metavar="FILE", default=argparse.SUPPRESS, help="Schedule: a stored one")
    add(
        "--schedule_interpolation",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Schedule: place a stored one by noise level in a run with other steps",
    )
    add(
        "--adacorr_mode",
        choices=("adaptive", "literal"),
        default=argparse.SUPPRESS,
        help="adaptive saves compute, literal is the published per-layer blend (adaptive)",
    )

    add = parser.add_argument_group("prompts and quality").add_argument
    add("--split", choices=("development", "test"), default="test", help="prompt split (test)")
    add(
        "--num_prompts",
        type=_number(int, 1),
        metavar="N",
        help="the first N prompts of the split (all)",
    )
    add("--prompts", metavar="FILE", help="JSON with the splits (benchmark/prompts/FAMILY.json)")
    add(
        "--judge",
        metavar="DIR",
        help="the small classifier (benchmark/pipelines/judge, of clips clip_judge)",
    )
    add(
        "--ode_reference",
        action="store_true",
        help="also compare with the converged solution of the sampling ODE (always in --sweep)",
    )
    add(
        "--inception_weights",
        metavar="FILE",
        help="Inception weights: FID instead of the judge's distance (extra: inception)",
    )
    add("--lpips_weights", metavar="FILE", help="state dict of LPIPS with AlexNet: adds LPIPS")

    add = parser.add_argument_group("latency and machine").add_argument
    add("--repetitions", type=_number(int, 1), default=3, metavar="N", help="timed rounds (3)")
    add("--warmup", type=_number(int, 0), default=1, metavar="N", help="untimed rounds (1)")
    add("--device", metavar="NAME", help="torch device (cuda if there is one, else cpu)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="weights' type (float32)",
    )
    add("--threads", type=_number(int, 1), metavar="N", help="CPU threads of each process")
    add(
        "--workers",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="processes that make pictures, one thread each by default if above 1 (1)",
    )

    add = parser.add_argument_group("several devices, under torchrun (names are xfuser's)")
    for name in DEGREES:
        add.add_argument(f"--{name}", type=_number(int, 1), default=1, metavar="N")
    add.add_argument("--use_cfg_parallel", action="store_true", help="a branch on each half")

    add = parser.add_argument_group("studies, instead of the comparison").add_argument
    add("--sweep", action="store_true", help="each method's curve over its knob, without latency")
    add(
        "--gamma_lambda_study",
        action="store_true",
        help="sensitivity to gamma and lambda in {0.5, 1, 2} of the corrected methods listed",
    )

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", metavar="DIR", help="new or empty (adacorr-results/FAMILY-NUMBER)")
    add("--resume", action="store_true", help="go on with an interrupted run")
    return parser


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
