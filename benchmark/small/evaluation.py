"""Measures a small pipeline and draws the pictures of its model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from benchmark.small.family import SmallFamily
from benchmark.small.grids import clip_rows, save_grid
from benchmark.small.splits import read_entries

Run = tuple[str, int, float]
"""Split, steps, guidance scale."""

PICTURE_RUNS: tuple[Run, ...] = (
    ("development", 50, 1.0),
    ("development", 28, 1.0),
    ("test", 50, 1.0),
    ("test", 28, 1.0),
    ("test", 28, 3.0),
)
CLIP_RUNS: tuple[Run, ...] = (("test", 30, 1.0), ("test", 30, 3.0))


def split_accuracy(
    family: SmallFamily,
    pipeline: DiffusionPipeline,
    judge: Any,
    split: str,
    steps: int,
    number: int | None = None,
    guidance_scale: float = 1.0,
) -> dict[str, float]:
    """The judge's opinion of what is generated for the first `number` entries of a split."""
    entries = read_entries(family.name, split, number)
    images = family.generate(pipeline, entries.texts, entries.seeds, steps, guidance_scale)
    return family.accuracy(judge, images, entries.texts)


def accuracy_table(
    family: SmallFamily, pipeline: DiffusionPipeline, judge: Any, runs: Sequence[Run] | None = None
) -> list[dict[str, float | int | str]]:
    """A row for each run, by default those of the model cards."""
    rows = []
    for split, steps, guidance in runs or (CLIP_RUNS if family.clips else PICTURE_RUNS):
        shares = split_accuracy(family, pipeline, judge, split, steps, guidance_scale=guidance)
        rows.append({"split": split, "steps": steps, "guidance_scale": guidance, **shares})
    return rows


def write_card_pictures(
    family: SmallFamily, pipeline: DiffusionPipeline, records: list[dict[str, float]], output: Path
) -> None:
    """Writes `samples.png` (32 test prompts, or 8 for clips, 50 steps) and `loss.svg`."""
    entries = read_entries(family.name, "test", 8 if family.clips else 32)
    images = family.generate(pipeline, entries.texts, entries.seeds, steps=50)
    save_grid(clip_rows(images) if family.clips else images, output / "samples.png")
    (output / "loss.svg").write_text(loss_svg(records))


def read_loss_log(path: Path) -> list[dict[str, float]]:
    """The records of a training's log in the order of steps; of repeated steps the last."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted({record["step"]: record for record in records}.values(), key=_step)


def loss_svg(records: list[dict[str, float]], width: int = 560, height: int = 240) -> str:
    """The loss over the steps as an SVG line, records being those of the training's log."""
    last, top = records[-1]["step"], 1.0
    left, bottom = 40, height - 30

    def x(step: float) -> float:
        return left + (width - left - 10) * step / last

    def y(loss: float) -> float:
        return bottom - (bottom - 10) * min(loss, top) / top

    points = " ".join(f"{x(r['step']):.1f},{y(r['loss']):.1f}" for r in records)
    lines = [
        f'<line x1="{left}" x2="{width - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    apart = 500 if last < 5000 else 1000
    labels = [
        f'<text x="{x(v):.1f}" y="{bottom + 16}" text-anchor="middle">{v}</text>'
        for v in range(0, int(last) + 1, apart)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *lines,
            *labels,
            f'<polyline points="{points}" fill="none" stroke="#2060c0" stroke-width="1.5"/>',
            f'<text x="{width - 10}" y="{height - 2}" text-anchor="end">training step</text>',
            "</svg>\n",
        ]
    )


def _step(record: dict[str, float]) -> float:
    return record["step"]
