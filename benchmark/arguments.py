"""The benchmark's command line: its arguments, and what is accepted for each."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from benchmark.errors import BenchmarkError
from benchmark.families import FAMILIES
from benchmark.method_names import ACCEPTED_METHODS, CORRECTED, UNCACHED
from xfuser_adacorr import METHODS
from xfuser_adacorr.config import STAND_INS

DEGREES = (
    "ulysses_degree",
    "ring_degree",
    "pipefusion_parallel_degree",
    "data_parallel_degree",
)


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
