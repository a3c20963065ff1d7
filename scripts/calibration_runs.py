"""Shared by the calibration scripts: full runs of a pipeline over development prompts."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_arguments(
    description: str,
    file_name: str,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    small = ROOT / "benchmark" / "pipelines" / "flux"
    parser.add_argument(
        "--model", default=str(small), help="diffusers directory (default: small FLUX)"
    )
    parser.add_argument(
        "--prompts",
        default=str(ROOT / "benchmark" / "prompts" / "flux.json"),
        help="split file; its development prompts are used",
    )
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--max_sequence_length", type=int, default=24)
    parser.add_argument("--output", help=f"default: {file_name} beside the transformer's weights")
    if add_options is not None:
        add_options(parser)
    arguments = parser.parse_args()
    arguments.output = Path(arguments.output or Path(arguments.model) / "transformer" / file_name)
    return arguments


def load_pipeline(arguments: argparse.Namespace) -> Any:
    pipe = DiffusionPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def development_entries(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    entries = json.loads(Path(arguments.prompts).read_text())["development"]
    return entries[: arguments.num_prompts]


def sample(
    pipe: Any, arguments: argparse.Namespace, entries: list[dict[str, Any]], output_type: str
) -> torch.Tensor:
    """The pictures, or latents, of some prompts, made in one batch."""
    return pipe(
        [entry["prompt"] for entry in entries],
        num_inference_steps=arguments.num_inference_steps,
        height=arguments.height,
        width=arguments.width,
        max_sequence_length=arguments.max_sequence_length,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        output_type=output_type,
    ).images


def run_pipeline(arguments: argparse.Namespace, recorder: Any) -> torch.nn.Module:
    """Sample the development prompts with ``recorder`` attached; return the transformer."""
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import find_family

    pipe = load_pipeline(arguments)
    transformer = pipe.transformer
    with recorder.attached(transformer, find_family(transformer)):
        for entry in tqdm(development_entries(arguments), desc="full runs", unit="picture"):
            if hasattr(recorder, "begin"):
                recorder.begin()
            sample(pipe, arguments, [entry], output_type="latent")
    return transformer


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("num_prompts", "num_inference_steps", "height", "width")
    return {name: getattr(arguments, name) for name in names}
