"""Fit a method to a model of one of the benchmark's families, on development prompts.

``calibrate.py METHOD``: Tea (the polynomial), Fast (linear maps), Ada (the codebook), EOC
(prior outputs of modules)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.loading import (
    call_arguments,
    check_texts,
    entry_text,
    load_pipeline,
    load_prompts,
    picture_shape,
)
from benchmark.options import add_options as add_fields
from benchmark.options import taken
from benchmark.settings import Settings
from xfuser_adacorr import calibrate

METHODS = ("Tea", "Fast", "Ada", "EOC")
TAKEN = (
    "model_type",
    "model",
    "prompts",
    "num_prompts",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
)
DEFAULTS = {"split": "development", "num_prompts": 16}
OWN = ("compute_fraction", "rates")
"""Options of Ada's calibration."""


def make_parser(description: str, default_output: str) -> argparse.ArgumentParser:
    """The options of scripts that run a family's pipeline on development prompts."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Sizes, frames and guidance are the family's usual ones if they are not given.",
    )
    add_fields(parser, Settings, TAKEN, DEFAULTS)
    add = parser.add_argument
    add("--output", type=Path, help=f"default: {default_output} beside the transformer's weights")
    add("--num_inference_steps", type=int, default=50, help="sampling steps (50)")
    return parser


def read_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; ``settings`` are those that the benchmark runs the family with."""
    arguments = parser.parse_args()
    try:
        given = taken({k: v for k, v in vars(arguments).items() if k in TAKEN}, Settings)
        arguments.settings = Settings(**{**DEFAULTS, **given, "output_dir": Path()})
    except BenchmarkError as error:
        parser.error(str(error))
    arguments.output = arguments.output or Path(arguments.settings.model) / "transformer"
    if not arguments.output.is_dir() and not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no directory {arguments.output.parent}")
    return arguments


def load(settings: Settings) -> tuple[Any, list[dict[str, Any]]]:
    """The pipeline, and the development prompts; `SystemExit` says what is wrong with them."""
    try:
        entries = load_prompts(settings)
        pipe = load_pipeline(settings)
        check_texts(settings, pipe, entries)
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    return pipe, entries


def output_type(settings: Settings) -> str:
    """Latents, or pictures where the pipeline gives none."""
    return "latent" if FAMILIES[settings.model_type].gives_latents else "pt"


def final_latents(
    pipe: Any, settings: Settings, entries: Sequence[dict[str, Any]], steps: int
) -> torch.Tensor:
    """Latents ``[B, ...]`` of some prompts, made in one batch; pictures where there are none."""
    texts = [entry_text(entry) for entry in entries]
    output = pipe(
        **call_arguments(settings, pipe, texts),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        output_type=output_type(settings),
    )
    return output[0]


def settings_of(settings: Settings, pipe: Any, **further: Any) -> dict[str, Any]:
    """What a file says of the runs that it was made from."""
    height, width = picture_shape(settings, pipe)
    content = {
        "num_prompts": settings.num_prompts,
        **further,
        "height": height,
        "width": width,
        "num_frames": settings.num_frames,
        "guidance_scale": settings.guidance_scale,
    }
    return {name: value for name, value in content.items() if value is not None}


def main() -> None:
    parser = make_parser(__doc__, "the method's file")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument(
        "--compute_fraction",
        type=float,
        help="Ada: share of the calls to be computed, about; the first and last two come on top "
        "(0.5)",
    )
    parser.add_argument("--rates", type=int, nargs="+", help="Ada: steps to the next (6 to 1)")
    arguments = read_arguments(parser)
    settings, given = arguments.settings, vars(arguments)
    pipe, entries = load(settings)
    prompts = [
        {**call_arguments(settings, pipe, [entry_text(entry)]), "seed": entry["seed"]}
        for entry in entries
    ]
    try:
        path = calibrate(
            pipe,
            arguments.method,
            prompts,
            num_inference_steps=arguments.num_inference_steps,
            output=arguments.output,
            output_type=output_type(settings),
            **{name: given[name] for name in OWN if given[name] is not None},
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
