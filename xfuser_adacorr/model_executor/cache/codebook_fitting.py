"""Fitting AdaCache's codebook to a model, from full runs of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from torch import nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.codebook import Codebook
from xfuser_adacorr.core.profile import Profile

from .api import disable_cache, enable_cache
from .diffusers_adapters.registry import ModelFamily
from .engine import engine_of

RATES = (6, 5, 4, 3, 2, 1)
LEAST_CHANGES_PER_RATE = 4
_EVERY_STEP = ((1.0, 1),)
_STEEPEST = 60.0


@dataclass(slots=True)
class AdaRecorder:
    """What Ada measures from step to step while every call is computed."""

    changes: list[float] = field(default_factory=list)
    """c, without MoReg."""
    motions: dict[float, list[float]] = field(default_factory=dict)
    """Share of the run -> motion of the clip predicted there."""

    @contextmanager
    def attached(self, transformer: nn.Module, family: ModelFamily) -> Iterator[None]:
        enable_cache(transformer, CacheConfig(use_cache="Ada", codebook=_EVERY_STEP))
        engine_of(transformer).method.observe = self.note
        try:
            yield
        finally:
            disable_cache(transformer)

    def note(self, place: float, change: float, motion: float | None) -> None:
        """Of one computed call, as `Ada` tells it."""
        self.changes.append(change)
        if motion is not None:
            self.motions.setdefault(place, []).append(motion)

    def mean_motion(self) -> Profile | None:
        """Mean over the runs at every place; None where there were no frames."""
        points = [(place, fmean(values)) for place, values in sorted(self.motions.items())]
        return Profile(tuple(points)) if points else None

    def fit(self, compute_fraction: float, rates: Sequence[int] = RATES) -> Codebook:
        """Thresholds that make ``rates`` cover the shares of `step_shares`, slowest change first.

        A computed call with rate r covers r steps, so its thresholds are quantiles of c over steps.
        Raises `ValueError` for a fraction that the rates cannot reach, or too few changes.
        """
        rates = sorted(set(rates), reverse=True)
        shares = step_shares(compute_fraction, rates)
        least = LEAST_CHANGES_PER_RATE * len(rates)
        if len(self.changes) < least:
            raise ValueError(
                f"a codebook of {len(rates)} rates needs at least {least} changes, "
                f"got {len(self.changes)}"
            )
        thresholds = np.quantile(self.changes, np.cumsum(shares)[:-1]).tolist()
        above_all = max(1.0, 2.0 * max(self.changes))
        return Codebook.of(list(zip([*thresholds, above_all], rates, strict=True)))


def step_shares(compute_fraction: float, rates: Sequence[int]) -> np.ndarray:
    """Share of all steps that each rate covers: ``sum(share / rate)`` is the compute fraction.

    Of the many choices the shares are those that change by the same factor from rate to rate + 1.
    Raises `ValueError` naming the range of fractions that ``rates`` can reach.
    """
    rate = np.array(rates, dtype=float)
    least, most = 1.0 / rate.max(), 1.0 / rate.min()
    if not least < compute_fraction < most:
        raise ValueError(
            f"compute_fraction must be between {least:.3f} and {most:.3f} for rates "
            f"{', '.join(map(str, rates))}, got {compute_fraction}"
        )

    def shares(slope: float) -> np.ndarray:
        weights = np.exp(slope * rate - (slope * rate).max())
        return weights / weights.sum()

    low, high = -_STEEPEST, _STEEPEST
    while high - low > 1e-12 * _STEEPEST:
        slope = (low + high) / 2
        if (shares(slope) / rate).sum() > compute_fraction:
            low = slope
        else:
            high = slope
    return shares(low)
