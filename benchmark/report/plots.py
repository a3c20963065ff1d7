"""Figures of a report. Each function writes one picture file."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageSequence

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmark.models.loading import entry_text
from benchmark.models.names import CORRECTED, UNCACHED
from benchmark.report.tables import by_steps, label
from benchmark.score.curves import curve_values

Result = Mapping[str, Any]
GRID_COLUMNS = 8
_MARKERS = "osD^vPX*<>"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_grid(path: Path, rows: Sequence[tuple[str, Path]], prompts: Sequence[str]) -> None:
    """Pictures of the first prompts: one line a method, one column a prompt.

    Of an animated file the first, the middle and the last frame are shown side by side.

    Args:
        path: where to write.
        rows: label and folder with ``000.png`` ... of every method.
        prompts: one a column, at most `GRID_COLUMNS` are drawn.
    """
    shown = [[still(folder / f"{i:03d}.png") for i in range(len(prompts))] for _, folder in rows]
    shape = shown[0][0].shape
    columns = min(len(prompts), max(1, GRID_COLUMNS * shape[0] // shape[1]))
    size = (1.25 * columns * shape[1] / shape[0] + 2, 1.3 * len(rows) + 0.6)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, stills, (text, _) in zip(axes, shown, rows, strict=True):
        for axis, picture in zip(line, stills, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for axis, prompt in zip(axes[0], prompts, strict=False):
        axis.set_title(textwrap.fill(prompt, 22), fontsize=5)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    _save(figure, path)


def still(path: Path) -> np.ndarray:
    """A picture [H, W, 3], or three frames of an animated one side by side [H, 3 W, 3]."""
    with Image.open(path) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    if len(frames) > 1:
        frames = [frames[0], frames[len(frames) // 2], frames[-1]]
    return np.concatenate(frames, axis=1)


def plot_quality(path: Path, results: Sequence[Result], *, quantity: str, title: str) -> None:
    """A quantity with a mean over compute fraction: one panel a step count, one line a method."""
    groups = by_steps(results)
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 5), squeeze=False)
    for axis, (steps, rows) in zip(axes[0], groups, strict=True):
        names = dict.fromkeys(row["cache_method"] for row in rows)
        bases = dict.fromkeys(name.removesuffix(CORRECTED) for name in names if name != UNCACHED)
        colours = {base: f"C{index % 10}" for index, base in enumerate(bases)}
        for name in names:
            points = sorted(
                (row["compute_fraction"], curve_values(row)[quantity])
                for row in rows
                if row["cache_method"] == name != UNCACHED and curve_values(row)[quantity]
            )
            if not points:
                continue
            base = name.removesuffix(CORRECTED)
            x, y = zip(*points, strict=True)
            axis.plot(
                x,
                y,
                color=colours[base],
                linestyle="-" if name != base or name == "Auto" else "--",
                marker=_MARKERS[list(bases).index(base) % len(_MARKERS)],
                markerfacecolor=colours[base] if name != base else "white",
                label=name,
            )
        axis.set(xlabel="compute fraction", ylabel=f"{title} (dB)", title=f"{steps} steps")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    _save(figure, path)


def plot_decisions(path: Path, rows: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Which calls of a picture each method computed (filled): one line a method.

    Args:
        path: where to write.
        rows: label, and 1 for each computed and 0 for each reused call.
    """
    longest = max(len(calls) for _, calls in rows)
    figure, axis = plt.subplots(figsize=(0.16 * longest + 2, 0.3 * len(rows) + 0.7))
    for line, (_, calls) in enumerate(rows):
        colours = ["C0" if computed else "0.9" for computed in calls]
        places = range(len(calls))
        axis.barh([line] * len(calls), [0.9] * len(calls), left=places, height=0.7, color=colours)
    axis.set(yticks=range(len(rows)), xlabel="call", xlim=(0, longest))
    axis.set_yticklabels([label for label, _ in rows], fontsize=8)
    axis.invert_yaxis()
    _save(figure, path)


def draw_comparison(store: Any, document: Mapping[str, Any]) -> dict[str, str]:
    """All figures of a comparison; name -> path relative to the report."""
    results, folder = document["results"], store.directory
    prompts = [entry_text(entry) for entry in document["prompts"]]
    figures = {}
    for steps, rows in by_steps(results):
        pictures = [(label(row), folder / "pictures" / row["key"]) for row in rows]
        figures[f"pictures, {steps} steps"] = store.save_figure(
            f"figures/pictures-{steps}.png", lambda p, r=pictures: plot_grid(p, r, prompts)
        )
        decided = [(label(row), row["computed_calls"]) for row in rows if row["computed_calls"]]
        if decided:
            figures[f"computed calls of the first prompt, {steps} steps"] = store.save_figure(
                f"figures/decisions-{steps}.png", lambda p, d=decided: plot_decisions(p, d)
            )
    return figures


def draw_quality(store: Any, document: Mapping[str, Any]) -> dict[str, str]:
    """PSNR over compute fraction, against the uncached run and the ODE if it is there."""
    figures = {}
    for quantity, title in (("psnr_db", "PSNR to uncached"), ("psnr_ode_db", "PSNR to ODE")):
        if any(row[quantity] for row in document["results"] if row["cache_method"] != UNCACHED):
            figures[f"{title} over compute fraction"] = store.save_figure(
                f"figures/{quantity.removesuffix('_db')}.png",
                lambda p, q=quantity, t=title: plot_quality(
                    p, document["results"], quantity=q, title=t
                ),
            )
    return figures
