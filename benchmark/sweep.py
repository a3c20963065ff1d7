"""The rows of a sweep, and the table interpolated from the curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, TypeVar

from benchmark.method_names import SCHEDULES, UNCACHED
from benchmark.peers import is_peer, peer_config, sweep_options
from benchmark.plan import (
    SOLVERS,
    Row,
    cached_row,
    fewer_steps_row,
    method_config,
    uncached_row,
)
from benchmark.sweeps import SWEEPS, Sweeps
from xfuser_adacorr import CacheConfig
from xfuser_adacorr.core.refreshes import evenly_spaced

T = TypeVar("T")

FRACTIONS = (0.25, 0.35, 0.5)
"""Compute fractions at which methods are compared."""

FEWER_STEPS = (0.22, 0.54)
"""Fewer-steps rows cover these shares of the reference's steps."""

SCHEDULE_SHARES = (0.2, *FRACTIONS, 0.54)
"""Shares of computed steps of the schedules that are tried, rounded up to whole steps."""


def sweep_rows(
    methods: Sequence[str],
    step_counts: Sequence[int],
    documented: Mapping[str, CacheConfig],
    options: Mapping[str, Any],
    solvers: Sequence[str] = SOLVERS,
    sweeps: Sweeps = SWEEPS["flux"],
) -> list[Row]:
    """Per step count: uncached, every method at every setting of its knob, both solvers."""
    own, rows = solvers[0], []
    for steps in step_counts:
        rows.append(uncached_row(steps, own))
        listed = sweeps[min(sweeps, key=lambda known: abs(known - steps))]
        for name in methods:
            if name == UNCACHED:
                continue
            if is_peer(name):
                configs = [peer_config(name, o) for o in sweep_options(name, listed["Fb"], steps)]
            else:
                knobs = even_schedules(steps) if name in SCHEDULES else listed[name]
                configs = [method_config(name, documented, {**options, **knob}) for knob in knobs]
            rows += [cached_row(name, steps, config, own) for config in configs]
        rows += fewer_steps_rows(steps, solvers)
    return list(dict.fromkeys(rows))


def fewer_steps_rows(steps: int, solvers: Sequence[str]) -> list[Row]:
    """Uncached runs whose compute covers that of the methods, by each solver."""
    low, high = (share * steps for share in FEWER_STEPS)
    counts = range(max(2, math.floor(low)), math.ceil(high) + 1, max(1, steps // 12))
    return [fewer_steps_row(solver, steps, count) for solver in solvers for count in counts]


def schedule_budgets(steps: int) -> list[int]:
    """Computed steps of the schedules that are tried."""
    return sorted({max(2, math.ceil(share * steps)) for share in SCHEDULE_SHARES})


def even_schedules(steps: int) -> list[dict[str, Any]]:
    """Schedules with evenly spaced computed steps, as options."""
    every = list(range(steps))
    return [{"schedule": tuple(evenly_spaced(every, n))} for n in schedule_budgets(steps)]


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
        "fid": result["fid"],
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
