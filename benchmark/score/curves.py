"""Curves over compute: interpolation, the best points, and values at equal compute."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from benchmark.models.names import UNCACHED
from benchmark.score.pictures import PSNR_CAP_DB
from benchmark.score.scoring import DISTANCES

T = TypeVar("T")
FRACTIONS = (0.25, 0.35, 0.5)
"""Compute fractions at which methods are compared."""


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear interpolation between (compute fraction, value) points; None outside their range.

    Points at the same compute fraction count as their mean.
    """
    places = sorted({x for x, _ in points})
    if not places or not places[0] <= at <= places[-1]:
        return None
    values = [fmean(y for x, y in points if x == place) for place in places]
    return float(np.interp(at, places, values))


def unbeaten(
    items: Sequence[T], cost: Callable[[T], float], value: Callable[[T], float]
) -> list[T]:
    """The items that none of the others beats in value at less cost or the same, cost rising."""
    kept: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -value(item))):
        if not kept or value(item) > value(kept[-1]):
            kept.append(item)
    return kept


def curve_values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The quantities of a results row that are drawn as curves over the compute fraction.

    PSNR is None where a picture is identical: the mean would depend on the cap.
    """
    values = {
        "psnr_db": None if result["identical"] else result["psnr_db"] and result["psnr_db"]["mean"],
        "psnr_ode_db": result["psnr_ode_db"] and result["psnr_ode_db"]["mean"],
        **{name: result[name] for name in DISTANCES if name in result},
        "prompt_accuracy": result["prompt_accuracy"],
    }
    if "temporal_psnr_db" in result:  # of clips
        temporal = result["temporal_psnr_db"]
        values["temporal_psnr_db"] = None if result["identical"] else temporal and temporal["mean"]
    return values


def interpolated_table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every step count, method and compute fraction of `FRACTIONS`."""
    table = []
    for steps in dict.fromkeys(result["reference_steps"] for result in results):
        of_steps = [result for result in results if result["reference_steps"] == steps]
        for name in dict.fromkeys(result["cache_method"] for result in of_steps):
            if name == UNCACHED:
                continue
            curve = [result for result in of_steps if result["cache_method"] == name]
            table += [_table_entry(steps, name, curve, fraction) for fraction in FRACTIONS]
    return table


def _table_entry(
    steps: int, name: str, curve: Sequence[Mapping[str, Any]], fraction: float
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "reference_steps": steps,
        "cache_method": name,
        "compute_fraction": fraction,
    }
    for quantity in curve_values(curve[0]):
        points = [(row["compute_fraction"], curve_values(row)[quantity]) for row in curve]
        known = [(x, y) for x, y in points if y is not None]
        entry[quantity] = interpolate(known, fraction)
    return entry


def at_equal_compute(
    rows: Sequence[Mapping[str, Sequence[float]]], group: Sequence[int], fraction: float
) -> dict[str, list[float]] | None:
    """Every picture's ``compute_fraction`` and ``psnr_db`` where the group's mean is as given.

    Linear between the two rows next to it; None if the rows do not reach it. Rows with a picture
    that is identical to the uncached one do not count: its PSNR is the cap's.
    """
    rows = [row for row in rows if max(row["psnr_db"]) < PSNR_CAP_DB]
    compute = [fmean(row["compute_fraction"][i] for i in group) for row in rows]
    if interpolate([(x, x) for x in compute], fraction) is None:
        return None
    return {
        name: [
            interpolate(list(zip(compute, values, strict=True)), fraction)
            for values in zip(*(row[name] for row in rows), strict=True)
        ]
        for name in ("compute_fraction", "psnr_db")
    }
