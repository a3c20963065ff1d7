"""Quantities that a calibration measured along an axis."""

import math
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """A quantity above 0 of a model over an axis, such as the place in a run."""

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """(place, value above 0), places rising; one point: the same everywhere."""

    def __post_init__(self) -> None:
        places = [place for place, _ in self.points]
        if not places or places != sorted(set(places)):
            raise ValueError(f"profile: places must rise, got {places}")
        if not all(math.isfinite(value) and value > 0.0 for _, value in self.points):
            raise ValueError(f"profile: values must be above 0, got {self.points}")

    def __call__(self, place: float) -> float:
        """Linear between the points, the end's value outside of them."""
        above = bisect_left(self.points, (place, 0.0))
        if above == 0:
            return self.points[0][1]
        if above == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[above - 1], self.points[above]
        return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
