"""The part of a model card that is read off a training's own records."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

LOSS_STEPS = (100, 250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000)


def training_document(
    pipeline: DiffusionPipeline,
    records: list[dict[str, float]],
    accuracy: list[dict[str, Any]],
    psnr_db: float,
    judge_accuracy: dict[str, float],
) -> str:
    """Markdown: the components' sizes, the training's length and loss, what was measured.

    Args:
        pipeline: the trained pipeline.
        records: of the loss log, in the order of steps (`evaluation.read_loss_log`).
        accuracy: rows of `evaluation.accuracy_table`.
        psnr_db: the autoencoder's, over fresh pictures.
        judge_accuracy: the judge's own, over fresh pictures or clips.
    """
    sizes = [
        [name, type(part).__name__, f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"]
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    ]
    last = records[-1]
    wanted = [step for step in LOSS_STEPS if step < last["step"]]
    shown = {step: min(records, key=lambda r: abs(r["step"] - step)) for step in wanted}
    losses = [
        [f"{record['step']}", f"{record['minutes']:g}", f"{_mean_loss(records, record):.3f}"]
        for record in (*shown.values(), last)
    ]
    rows = [
        [row["split"], row["steps"], f"{row['guidance_scale']:g}"]
        + [f"{row[name]:.3f}" for name in ("attributes", "whole")]
        for row in accuracy
    ]
    sections = [
        "# Training record\n\nWritten by `scripts/train_small.py` from the training's log.",
        "## Components\n\n" + _table(["component", "class", "parameters"], sizes),
        f"## Loss\n\n{last['step']} steps in {last['minutes']:g} minutes. "
        "Losses are means of the 100 steps before.\n\n"
        + _table(["step", "minutes", "loss"], losses),
        "## Measured\n\n"
        + _table(["split", "steps", "guidance_scale", "attributes", "whole prompt"], rows)
        + f"\n\nAutoencoder: {psnr_db:.1f} dB on fresh pictures. The judge is right about "
        f"{judge_accuracy['attributes']:.4f} of the attributes of fresh examples, and about all of "
        f"them in {judge_accuracy['whole']:.4f}.",
    ]
    return "\n\n".join(sections) + "\n"


def _mean_loss(records: list[dict[str, float]], until: dict[str, float]) -> float:
    before = [r["loss"] for r in records if 0 <= until["step"] - r["step"] < 100]
    return sum(before) / len(before)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
