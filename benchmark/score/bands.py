"""Curves over compute with confidence bands: a bootstrap over the pictures of the rows.

Every resample draws the same pictures of every row (`samples.draws`), so that the difference of two
methods has a band of its own, which is narrower than those of the methods when pictures that are
hard for one are hard for the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmark.score.curves import unbeaten
from benchmark.score.samples import draws
from benchmark.score.scoring import DISTANCES, FID, JUDGE_DISTANCE

CONFIDENCE = 0.95
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that rows are compared by."""

    name: str
    """In ``samples``."""
    title: str
    digits: int
    higher_is_better: bool = True


QUANTITIES = (
    Quantity("psnr", "PSNR to uncached (dB)", 1),
    Quantity("psnr_ode", "PSNR to ODE (dB)", 1),
    Quantity("ssim", "SSIM to uncached", 4),
    Quantity("ssim_ode", "SSIM to ODE", 4),
    Quantity(JUDGE_DISTANCE, "judge distance", 2, higher_is_better=False),
    Quantity(FID, "FID", 2, higher_is_better=False),
    Quantity("prompt_accuracy", "prompt accuracy", 3),
)


@dataclass(frozen=True, slots=True)
class Point:
    """A quantity at a place on the axis of a curve."""

    x: float
    value: float
    resampled: Tensor
    """The value in every resample [RESAMPLES]."""

    def band(self) -> tuple[float, float]:
        """Ends of the percentile interval."""
        tail = (1 - CONFIDENCE) / 2
        low, high = torch.quantile(self.resampled, torch.tensor([tail, 1 - tail])).tolist()
        return low, high

    def minus(self, other: "Point") -> "Point":
        """The difference on the same pictures."""
        return Point(self.x, self.value - other.value, self.resampled - other.resampled)


_draws = cache(draws)


def compute(result: Result) -> float:
    return result["compute_fraction"]


def seconds(result: Result) -> float:
    return result["latency_s"]["median"]


def curve(
    results: Sequence[Result], quantity: Quantity, axis: Callable[[Result], float] = compute
) -> list[Point]:
    """The rows that have the quantity, along the axis."""
    points = []
    for result in results:
        values = result["samples"].get(quantity.name)
        if values is None:
            continue
        values = torch.tensor(values, dtype=torch.float32)
        if quantity.name in DISTANCES:  # its resamples were computed with the row
            # Repeated pictures raise it: the band is moved to where the value is.
            value = result[quantity.name]
            points.append(Point(axis(result), value, values - values.mean() + value))
        else:
            resampled = values[_draws(len(values))].mean(dim=1)
            points.append(Point(axis(result), float(values.mean()), resampled))
    return sorted(points, key=lambda point: point.x)


def best_settings(
    results: Sequence[Result], axis: Callable[[Result], float] = compute
) -> list[Result]:
    """The rows of a method that none of its others beats in PSNR to the uncached run at less
    compute, or at the same. Other quantities are read from these rows too: a setting that spoils
    the picture may be nearer to the real ones by chance."""
    return unbeaten(results, axis, _psnr)


def _psnr(result: Result) -> float:
    return fmean(result["samples"]["psnr"])


def best_curve(
    results: Sequence[Result], quantity: Quantity, axis: Callable[[Result], float] = compute
) -> list[Point]:
    """The curve of the best settings; what more compute does not improve stays as it is."""
    points = curve(best_settings(results, axis), quantity, axis)
    last = max(axis(result) for result in results)
    if points and points[-1].x < last:
        points.append(replace(points[-1], x=last))
    return points


def point_at(points: Sequence[Point], x: float) -> Point | None:
    """Interpolated linearly between the points around x; None outside their range."""
    for point in points:
        if point.x == x:
            return point
    for a, b in pairwise(points):
        if a.x < x < b.x:
            share = (x - a.x) / (b.x - a.x)
            value = a.value + share * (b.value - a.value)
            return Point(x, value, a.resampled + share * (b.resampled - a.resampled))
    return None
