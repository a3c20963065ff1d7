"""Shared by the calibration scripts: a family's pipeline on development prompts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

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
from benchmark.models.package import find_family
from benchmark.options import add_options as add_fields
from benchmark.options import taken
from benchmark.run.generate import make_picture
from benchmark.settings import Settings

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


def add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=int, default=50, help="sampling steps (50)")


def parse_arguments(
    description: str,
    file_name: str,
    add_options: Callable[[argparse.ArgumentParser], None] = add_steps,
) -> argparse.Namespace:
    """The command line; ``settings`` are those that the benchmark runs the family with."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Sizes, frames and guidance are the family's usual ones if they are not given.",
    )
    add_fields(parser, Settings, TAKEN, DEFAULTS)
    parser.add_argument(
        "--output", type=Path, help=f"default: {file_name} beside the transformer's weights"
    )
    add_options(parser)
    arguments = parser.parse_args()
    try:
        given = taken({k: v for k, v in vars(arguments).items() if k in TAKEN}, Settings)
        arguments.settings = Settings(**{**DEFAULTS, **given, "output_dir": Path()})
    except BenchmarkError as error:
        parser.error(str(error))
    model = Path(arguments.settings.model)
    arguments.output = arguments.output or model / "transformer" / file_name
    if not arguments.output.parent.is_dir():
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


def final_latents(
    pipe: Any, settings: Settings, entries: Sequence[dict[str, Any]], steps: int
) -> torch.Tensor:
    """Latents ``[B, ...]`` of some prompts, made in one batch; pictures where there are none."""
    texts = [entry_text(entry) for entry in entries]
    output = pipe(
        **call_arguments(settings, pipe, texts),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        output_type="latent" if FAMILIES[settings.model_type].gives_latents else "pt",
    )
    return output[0]


def run_pipeline(arguments: argparse.Namespace, recorder: Any) -> Any:
    """Sample the development prompts with ``recorder`` attached; returns the pipeline."""
    settings = arguments.settings
    pipe, entries = load(settings)
    with recorder.attached(pipe.transformer, find_family(pipe.transformer)):
        for entry in tqdm(entries, desc="full runs", unit="prompt"):
            if hasattr(recorder, "begin"):
                recorder.begin()
            make_picture(pipe, settings, entry, arguments.num_inference_steps)
    return pipe


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
