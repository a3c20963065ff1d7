"""Shared by the calibration scripts: a family's pipeline on development prompts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.command import passed_on  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.families import FAMILIES  # noqa: E402
from benchmark.generate import make_picture  # noqa: E402
from benchmark.loading import (  # noqa: E402
    check_texts,
    entry_text,
    load_pipeline,
    load_prompts,
    picture_shape,
)
from benchmark.settings import Settings, read_settings  # noqa: E402

PASSED_ON = (
    "model_type",
    "model",
    "prompts",
    "num_prompts",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
)


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
    add = parser.add_argument
    add("--model_type", choices=sorted(FAMILIES), default="flux", help="model family (flux)")
    add("--model", metavar="DIR", help="diffusers directory (the small pipeline of the family)")
    add(
        "--prompts",
        metavar="FILE",
        help="split file, whose development prompts are used (benchmark/prompts/FAMILY.json)",
    )
    add("--num_prompts", type=int, default=16, metavar="N", help="the first N of them (16)")
    add("--guidance_scale", type=float, metavar="S", help="of families that batch guidance")
    add("--height", type=int, metavar="H", help="pixels")
    add("--width", type=int, metavar="W", help="pixels")
    add("--num_frames", type=int, metavar="N", help="of a clip")
    add("--output", type=Path, help=f"default: {file_name} beside the transformer's weights")
    add_options(parser)
    arguments = parser.parse_args()
    try:
        arguments.settings = read_settings(
            ["--split=development", *passed_on(arguments, PASSED_ON), "--output_dir=."]
        )
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
    family = FAMILIES[settings.model_type]
    texts = [entry_text(entry) for entry in entries]
    output = pipe(
        **family.call(pipe, settings, texts, picture_shape(settings, pipe)),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        output_type="latent" if family.gives_latents else "pt",
    )
    return output[0]


def run_pipeline(arguments: argparse.Namespace, recorder: Any) -> Any:
    """Sample the development prompts with ``recorder`` attached; returns the pipeline."""
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import find_family

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
