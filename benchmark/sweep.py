"""Each method's knob and the values a sweep tries, and the table interpolated from the curves."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from benchmark.plan import Row, cached_row, fewer_steps_row, method_config, uncached_row
from benchmark.schedulers import SOLVERS
from benchmark.settings import CORRECTED, UNCACHED
from xfuser_adacorr import CacheConfig

FRACTIONS = (0.25, 0.35, 0.5)
"""Compute fractions at which methods are compared."""

FEWER_STEPS = (0.22, 0.54)
"""Fewer-steps rows cover these shares of the reference's steps."""


def _over(knob: str, *values: float) -> list[dict[str, Any]]:
    return [{knob: value} for value in values]


def _corrected(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """Thresholds, looser than the base method's own, with the tolerance that makes up for it."""
    return [{"rel_l1_thresh": x, "adacorr_tolerance": tolerance} for x, tolerance in points]


SWEEPS: dict[int, dict[str, list[dict[str, Any]]]] = {
    28: {
        "Fb": _over("rel_l1_thresh", 0.12, 0.16, 0.2, 0.28, 0.36),
        "Fb" + CORRECTED: _corrected(
            (0.12, 0.01), (0.2, 0.01), (0.35, 0.01), (0.35, 0.02), (0.6, 0.04), (0.6, 0.15)
        ),
        "Tea": _over("rel_l1_thresh", 0.1, 0.14, 0.18, 0.25, 0.32),
        "Tea" + CORRECTED: _corrected(
            (0.1, 0.02), (0.14, 0.02), (0.18, 0.02), (0.3, 0.02), (0.3, 0.05), (0.45, 0.05)
        ),
        "Fast": _over("rel_l1_thresh", 0.045, 0.055, 0.08, 0.1, 0.14, 0.18),
        "Fast" + CORRECTED: _corrected(
            (0.08, 0.01), (0.1, 0.01), (0.18, 0.01), (0.32, 0.01), (0.32, 0.04), (0.6, 0.08)
        ),
        "Ada": _over("rel_l1_thresh", 0.21, 0.25, 0.32, 0.4, 0.6, 1.6),
        "Ada" + CORRECTED: _corrected((0.2, 0.01), (0.4, 0.01), (0.8, 0.02), (1.6, 0.05)),
        "Auto": _over("adacorr_tolerance", 0.0015, 0.003, 0.006, 0.012, 0.025, 0.05),
    },
    50: {
        "Fb": _over("rel_l1_thresh", 0.065, 0.08, 0.11, 0.16, 0.22),
        "Fb" + CORRECTED: _corrected(
            (0.065, 0.01), (0.1, 0.01), (0.16, 0.01), (0.27, 0.005), (0.27, 0.02)
        ),
        "Tea": _over("rel_l1_thresh", 0.055, 0.08, 0.11, 0.15, 0.2),
        "Tea" + CORRECTED: _corrected(
            (0.055, 0.01), (0.08, 0.01), (0.11, 0.01), (0.15, 0.01), (0.25, 0.005)
        ),
        "Fast": _over("rel_l1_thresh", 0.027, 0.034, 0.045, 0.06, 0.08, 0.1),
        "Fast" + CORRECTED: _corrected(
            (0.04, 0.01), (0.05, 0.01), (0.06, 0.01), (0.1, 0.01), (0.16, 0.003), (0.16, 0.006)
        ),
        "Ada": _over("rel_l1_thresh", 0.12, 0.15, 0.2, 0.3, 0.4, 0.6),
        "Ada" + CORRECTED: _corrected((0.12, 0.01), (0.2, 0.01), (0.3, 0.01), (0.6, 0.02)),
        "Auto": _over("adacorr_tolerance", 0.0005, 0.001, 0.002, 0.004, 0.008),
    },
}
"""Steps -> method -> options tried. Other step counts take the lists of the nearest one here."""


def sweep_rows(
    methods: Sequence[str],
    step_counts: Sequence[int],
    documented: Mapping[str, CacheConfig],
    options: Mapping[str, Any],
    sweeps: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]] = SWEEPS,
) -> list[Row]:
    """Per step count: uncached, every method at every setting of its knob, both solvers."""
    rows = []
    for steps in step_counts:
        rows.append(uncached_row(steps))
        listed = sweeps[min(sweeps, key=lambda known: abs(known - steps))]
        for name in methods:
            if name == UNCACHED:
                continue
            for knob in listed[name]:
                config = method_config(name, documented, {**options, **knob})
                rows.append(cached_row(name, steps, config))
        low, high = (share * steps for share in FEWER_STEPS)
        counts = range(max(2, math.floor(low)), math.ceil(high) + 1, max(1, steps // 12))
        rows += [fewer_steps_row(solver, steps, count) for solver in SOLVERS for count in counts]
    return list(dict.fromkeys(rows))


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear interpolation between (compute fraction, value) points; None outside their range.

    Points at the same compute fraction count as their mean.
    """
    ordered = sorted(points)
    curve = []
    for x, group in groupby(ordered, key=lambda point: point[0]):
        values = [y for _, y in group]
        curve.append((x, sum(values) / len(values)))
    for x, y in curve:
        if x == at:
            return y
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < at < x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def curve_values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The quantities of a results row that are drawn as curves over the compute fraction.

    PSNR is None where a picture is identical: the mean would depend on the cap.
    """
    return {
        "psnr_db": None if result["identical"] else result["psnr_db"] and result["psnr_db"]["mean"],
        "psnr_ode_db": result["psnr_ode_db"] and result["psnr_ode_db"]["mean"],
        "fid": result["fid"],
        "prompt_accuracy": result["prompt_accuracy"],
    }


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
    for quantity in ("psnr_db", "psnr_ode_db", "fid", "prompt_accuracy"):
        points = [(row["compute_fraction"], curve_values(row)[quantity]) for row in curve]
        known = [(x, y) for x, y in points if y is not None]
        entry[quantity] = interpolate(known, fraction)
    return entry
