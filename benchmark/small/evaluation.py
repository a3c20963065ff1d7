"""Measures the shipped pipeline and draws the pictures of its model card."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import FluxPipeline

from benchmark.small.flux import generate
from benchmark.small.grids import save_grid
from benchmark.small.judge import Judge
from benchmark.small.splits import read_split


def split_accuracy(
    pipeline: FluxPipeline, judge: Judge, split: str, steps: int, number: int | None = None
) -> dict[str, float]:
    """`Judge.prompt_accuracy` of pictures generated for the first `number` prompts of a split."""
    entries = read_split(split)[:number]
    prompts = [entry["prompt"] for entry in entries]
    pictures = generate(pipeline, prompts, [entry["seed"] for entry in entries], steps)
    return judge.prompt_accuracy(pictures, prompts)


def accuracy_table(
    pipeline: FluxPipeline, judge: Judge, steps: Sequence[int] = (50, 28)
) -> list[dict[str, float | int | str]]:
    """A row for each split and number of steps."""
    return [
        {"split": split, "steps": count, **split_accuracy(pipeline, judge, split, count)}
        for split in ("development", "test")
        for count in steps
    ]


def write_card_pictures(pipeline: FluxPipeline, loss_log: Path, output: Path) -> None:
    """Writes `samples.png` (32 test prompts, 50 steps) and `loss.svg` into `output`."""
    entries = read_split("test")[:32]
    prompts = [entry["prompt"] for entry in entries]
    pictures = generate(pipeline, prompts, [entry["seed"] for entry in entries], steps=50)
    save_grid(pictures, output / "samples.png")
    records = [json.loads(line) for line in loss_log.read_text().splitlines()]
    (output / "loss.svg").write_text(loss_svg(records))


def loss_svg(records: list[dict[str, float]], width: int = 560, height: int = 240) -> str:
    """The loss over the steps as an SVG line, records being those of the training's log."""
    records = sorted({record["step"]: record for record in records}.values(), key=_step)
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
    labels = [
        f'<text x="{x(v):.1f}" y="{bottom + 16}" text-anchor="middle">{v}</text>'
        for v in range(0, int(last) + 1, 500)
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
