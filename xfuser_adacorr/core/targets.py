"""Targets in place of a tolerance: a compute budget to be spent, a fidelity to be expected.

The expected error of a reused call grows with the drift since the last refresh, so over a gap of g
equal steps it adds up to ``(s g)^2 / 2`` with a rate s a step. For a given number of refreshes the
sum over all gaps is smallest where every gap adds up to the same error, the tolerance ``tau``;
``L = sum s`` over the steps to come then takes ``L / sqrt(2 tau)`` refreshes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LAST_GAP = 1 / 3
"""Length of the gap after the last refresh, whose error nothing repairs, in those of other gaps."""


def refreshes_left(
    target: float, calls: int, spent: float, remaining: int, reuse_cost: float
) -> int:
    """Whole refreshes that bring the compute of a run nearest to ``target * calls``.

    ``spent`` is the compute so far in units of a full call, ``remaining`` the calls to come, each
    of at least ``reuse_cost``. Between 0 and ``remaining``.
    """
    if reuse_cost >= 1.0:
        return remaining
    affordable = (target * calls - spent - remaining * reuse_cost) / (1.0 - reuse_cost)
    return min(max(math.floor(affordable + 0.5), 0), remaining)


def budget_tolerance(ahead: float, refreshes: int) -> float:
    """tau that spends ``refreshes`` (at least 1) over the rates ``ahead``.

    ``(L / (B + LAST_GAP))^2 / 2``: B equal gaps and one, to the end, of `LAST_GAP` of their length.
    """
    return (ahead / (refreshes + LAST_GAP)) ** 2 / 2.0


def fidelity_tolerance(ahead: float, allowed: float) -> float:
    """tau with which the errors of all gaps ``ahead`` add up to ``allowed``: ``2 (A / L)^2``.

    ``L / sqrt(2 tau)`` gaps of tau each. 0 where nothing is allowed any more.
    """
    return 2.0 * (max(allowed, 0.0) / ahead) ** 2 if ahead > 0.0 else math.inf


@dataclass(frozen=True, slots=True)
class PsnrRelation:
    """``PSNR = at_one - slope * log10(E)``: E is the expected error added up over a run."""

    at_one: float
    """dB at E = 1, the latents' own norm."""
    slope: float
    """dB per factor of ten, above 0; 20 where the picture's error is proportional to E."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_one) and math.isfinite(self.slope) and self.slope > 0.0):
            raise ValueError(f"psnr: at_one must be finite and slope above 0, got {self}")

    def psnr_db(self, error: float) -> float:
        return math.inf if error <= 0.0 else self.at_one - self.slope * math.log10(error)

    def error(self, psnr_db: float) -> float:
        return 10.0 ** ((self.at_one - psnr_db) / self.slope)

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]]) -> "PsnrRelation":
        """Least squares through (error above 0, PSNR in dB); `ValueError` if they cannot tell."""
        logs = [math.log10(error) for error, _ in points]
        values = [psnr for _, psnr in points]
        if len(set(logs)) < 2:
            raise ValueError("psnr: a fit needs runs of at least two different expected errors")
        mean_x, mean_y = sum(logs) / len(logs), sum(values) / len(values)
        covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(logs, values, strict=True))
        slope = -covariance / sum((x - mean_x) ** 2 for x in logs)
        return cls(mean_y + slope * mean_x, slope)
