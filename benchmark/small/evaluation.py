"""Measures a small pipeline and draws the pictures of its model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from diffusers import DiffusionPipeline

from benchmark.models.families import FAMILIES
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
    for split, steps, guidance in runs or _card_runs(family):
        shares = split_accuracy(family, pipeline, judge, split, steps, guidance_scale=guidance)
        rows.append({"split": split, "steps": steps, "guidance_scale": guidance, **shares})
    return rows


def _card_runs(family: SmallFamily) -> tuple[Run, ...]:
    if not family.clips:
        return PICTURE_RUNS
    return ("test", 30, 1.0), ("test", 30, FAMILIES[family.name].guidance_scale)


def write_card_pictures(
    family: SmallFamily, pipeline: DiffusionPipeline, records: list[dict[str, float]], output: Path
) -> None:
    """Writes `samples.png` (32 test prompts, or 8 for clips, 50 steps) and `loss.svg`."""
    entries = read_entries(family.name, "test", 8 if family.clips else 32)
    images = family.generate(pipeline, entries.texts, entries.seeds, steps=50)
    save_grid(clip_rows(images) if family.clips else images, output / "samples.png")
    draw_loss(records, output / "loss.svg")


def read_loss_log(path: Path) -> list[dict[str, float]]:
    """The records of a training's log in the order of steps; of repeated steps the last."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted({record["step"]: record for record in records}.values(), key=_step)


def draw_loss(records: list[dict[str, float]], path: Path) -> None:
    """The loss over the steps as a picture file, records being those of the training's log."""
    figure, axis = plt.subplots(figsize=(5.6, 2.4))
    axis.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1)
    axis.set(xlabel="training step", ylim=(0, 1))
    axis.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _step(record: dict[str, float]) -> float:
    return record["step"]
