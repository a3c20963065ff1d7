"""Fit a learned plan to any pipeline, or state its PSNR for other prompts:
``python -m xfuser_adacorr PIPELINE PROMPTS ...``, or ``torchrun --nproc_per_node N -m ...``."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xfuser_adacorr import calibrate_learned, measure_plan
from xfuser_adacorr.model_executor.cache.calibration.learned import BUDGETS, SEARCH_EVALUATIONS

FITTED_WITH = ("budgets", "search_evaluations", "held_out")
"""Arguments of a calibration alone."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xfuser_adacorr",
        description="Fit a learned plan to a pipeline of diffusers, and store it beside the model. "
        "Interrupted, the same command goes on. Under torchrun the processes divide the prompts.",
    )
    add = parser.add_argument
    add("pipeline", help="directory, or name on the hub (then --output is needed)")
    add("prompts", type=Path, help="a text file, one prompt a line, or a JSON list of texts or of "
        "arguments of one call each")  # fmt: skip
    add("--num_inference_steps", type=int, required=True, help="as the pipeline is to be called")
    shares = " ".join(map(str, BUDGETS))
    add("--budgets", type=float, nargs="+", help=f"shares of the steps to compute ({shares})")
    add("--search_evaluations", type=int, help=f"schedules a budget ({SEARCH_EVALUATIONS})")
    add("--held_out", type=int, help="prompts to state the PSNR for, not to fit on (a quarter)")
    add("--batch_size", type=int, default=1, help="prompts sampled together (1)")
    add("--seed", type=int, default=0, help="of the noise and of the search (0)")
    add("--output", type=Path, help="plan.json in the pipeline's directory")
    add("--measure", action="store_true",
        help="fit nothing: state the PSNR of a plan that is there, for these prompts")  # fmt: skip
    add("--dtype", default="bfloat16", help="of torch, in which the model is loaded (bfloat16)")
    add("--device", help="cuda where there is one")
    add("--call", nargs="*", default=[], metavar="NAME=VALUE", type=_argument,
        help="further arguments of the pipeline: guidance_scale=3.5 height=512")  # fmt: skip
    return parser


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read_prompts(path: Path) -> list[Any]:
    """Texts, or arguments of one call each; `ValueError` if the file holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {path}")
    text = path.read_text()
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = json.loads(text)
    if not isinstance(content, list) or not all(isinstance(each, (str, dict)) for each in content):
        raise ValueError(f"prompts: {path} must be a list of texts or of arguments of one call")
    return content


def load(name: str, dtype: str, device: str | None) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be the name of a type of torch, got {dtype!r}")
    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=getattr(torch, dtype))
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def replicas() -> Iterator[Any]:
    """The group of the processes that torchrun started, each on a device of its own; else None.

    Only numbers of the fit are sent, from host to host.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after one line that says what was wrong."""
    parsed = vars(make_parser().parse_args(arguments))
    given = {name: value for name, value in parsed.items() if value is not None}
    call, measure = dict(given.pop("call")), given.pop("measure")
    given = {"device": None, "output": None, **given}
    try:
        for name in FITTED_WITH:
            if measure and name in given:
                raise ValueError(f"--{name} is of a calibration, and --measure fits nothing")
        prompts = read_prompts(given.pop("prompts"))
        with replicas() as group:
            given["replicas"] = group
            pipe = load(given.pop("pipeline"), given.pop("dtype"), given.pop("device"))
            if measure:
                path = measure_plan(pipe, prompts, plan=given.pop("output"), **call, **given)
            else:
                path = calibrate_learned(pipe, prompts, **call, **given)
        if os.environ.get("RANK", "0") == "0":
            print(f"wrote {path}")
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
