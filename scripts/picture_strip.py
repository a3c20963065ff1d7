"""Draw docs/images/strip.png: the shipped FLUX pipeline uncached, cached, and corrected.

Run it from the repository's root: ``python scripts/picture_strip.py``. It prints the compute and
the PSNR of every picture; the caption in README.md says them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from xfuser_adacorr import (  # noqa: E402 - the root is on the path now
    Auto,
    Fb,
    cache_summary,
    disable_cache,
    enable_cache,
)

PICTURE = ROOT / "docs" / "images" / "strip.png"
ENTRIES = (0, 3)
"""Places of the prompts in the test split."""
STEPS = 28
METHODS = {"Fb": Fb(threshold=0.32), "Auto": Auto(target_compute=0.25, use_plan=False)}
GAIN = 4
"""How much larger than they are errors are drawn."""
SCALE = 4
HEADER = 24


def draw(pipe: Any, entry: dict[str, Any]) -> np.ndarray:
    """One picture ``[64, 64, 3]`` in [0, 1]."""
    return pipe(
        entry["prompt"],
        num_inference_steps=STEPS,
        height=64,
        width=64,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(entry["seed"]),
        output_type="np",
    ).images[0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of pictures in [0, 1]."""
    return float(-10.0 * np.log10(np.mean((a - b) ** 2)))


def enlarged(picture: np.ndarray) -> np.ndarray:
    pixels = (picture.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    return pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def main() -> None:
    pipe = FluxPipeline.from_pretrained(ROOT / "benchmark" / "pipelines" / "flux")
    pipe.set_progress_bar_config(disable=True)
    split = json.loads((ROOT / "benchmark" / "prompts" / "flux.json").read_text())["test"]
    entries = [split[place] for place in ENTRIES]
    uncached = [draw(pipe, entry) for entry in entries]
    columns = {"uncached": uncached}
    for name, method in METHODS.items():
        enable_cache(pipe, method)
        columns[name] = []
        for entry, reference in zip(entries, uncached, strict=True):
            columns[name].append(draw(pipe, entry))
            compute = cache_summary(pipe).compute_fraction
            quality = psnr(columns[name][-1], reference)
            print(f"{name}: compute {compute:.3f}, {quality:.1f} dB, {entry['prompt']}")
        disable_cache(pipe)
        errors = [GAIN * abs(a - b) for a, b in zip(columns[name], uncached, strict=True)]
        columns[f"error of {name}, x{GAIN}"] = errors
    rows = [np.hstack([enlarged(column[i]) for column in columns.values()]) for i in range(2)]
    pixels = np.vstack(rows)
    strip = Image.new("RGB", (pixels.shape[1], HEADER + pixels.shape[0]), "white")
    strip.paste(Image.fromarray(pixels), (0, HEADER))
    width = pixels.shape[1] // len(columns)
    for i, name in enumerate(columns):
        ImageDraw.Draw(strip).text((i * width + 6, 3), name, fill="black", font_size=16)
    PICTURE.parent.mkdir(exist_ok=True)
    strip.quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
