"""Fits what targets need to know of a model from traces of `Auto` and the pictures they gave."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.targets import PsnrRelation

from .context import CallRecord, Trace
from .correction.targets import TargetCalibration
from .samplers import NoiseSchedule

BINS = 10
"""Parts of the forecast's axis that rates are averaged over."""
FIRST_LINE = 3
"""Refresh from which on kappa is that of a line; before, of the last value."""


def measured_rates(trace: Trace, schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(coordinate, rate) of the first reused call after each refresh of a run of one branch.

    The rate is ``sqrt(kappa) * ||v|| / ||x||`` (`..core.targets`).
    """
    rates, refreshes = [], 0
    for before, call in pairwise(trace.calls):
        refreshes += before.refreshed
        known = not call.refreshed and call.expected_offset and call.expected_error
        if not before.refreshed or refreshes < FIRST_LINE or not known:
            continue
        index = call.step_index
        velocity = call.expected_error / (call.expected_offset * schedule.followed[index])
        kappa = call.expected_offset / call.temporal
        rates.append((schedule.coordinates[index], math.sqrt(kappa) * velocity))
    return rates


def expected_error(calls: Sequence[CallRecord]) -> float:
    """Expected errors of all gaps of a run of one branch, added up."""
    ends = [call for call, after in pairwise(calls) if after.refreshed]
    return sum(call.expected_error for call in [*ends, calls[-1]] if not call.refreshed)


@dataclass(slots=True)
class TargetRecorder:
    """Collects runs, then fits."""

    rates: list[tuple[float, float]] = field(default_factory=list)
    pictures: list[tuple[float, float]] = field(default_factory=list)
    """(expected error, PSNR in dB against the uncached picture) of each run."""

    def add(self, trace: Trace, schedule: NoiseSchedule, psnr_db: float) -> None:
        """A run of one branch; identical pictures and runs without reuse tell nothing."""
        self.rates += measured_rates(trace, schedule)
        error = expected_error(trace.calls)
        if error > 0.0 and math.isfinite(psnr_db):
            self.pictures.append((error, psnr_db))

    def fit(self) -> TargetCalibration:
        """Mean rates in bins, and the line of PSNR over the logarithm of the expected error."""
        if not self.rates:
            raise ValueError("targets: a fit needs runs with reused calls")
        low, high = min(self.rates)[0], max(self.rates)[0]
        width = max(high - low, 1e-6) / BINS
        bins: dict[int, list[tuple[float, float]]] = {}
        for place, rate in self.rates:
            bins.setdefault(min(int((place - low) / width), BINS - 1), []).append((place, rate))
        points = [
            tuple(sum(values) / len(values) for values in zip(*bins[index], strict=True))
            for index in sorted(bins)
        ]
        return TargetCalibration(Profile(tuple(points)), PsnrRelation.fitted(self.pictures))

    def spread_db(self, relation: PsnrRelation) -> float:
        """Standard deviation of the pictures' PSNR around the relation."""
        missed = [(psnr - relation.psnr_db(error)) ** 2 for error, psnr in self.pictures]
        return math.sqrt(sum(missed) / len(missed))
