"""Fitting AdaCache's codebook to a model, from full runs of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq
from torch import nn

from xfuser_adacorr.model_executor.cache.api import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily
from xfuser_adacorr.model_executor.cache.intercept import owner_of
from xfuser_adacorr.model_executor.cache.methods.ada import Ada
from xfuser_adacorr.model_executor.cache.methods.codebook import Codebook

RATES = (6, 5, 4, 3, 2, 1)
LEAST_CHANGES_PER_RATE = 4
_EVERY_STEP = ((1.0, 1),)
_STEEPEST = 60.0


@dataclass(slots=True)
class AdaRecorder:
    """What Ada measures from step to step while every call is computed."""

    changes: list[float] = field(default_factory=list)
    """c, without MoReg."""

    @contextmanager
    def attached(self, transformer: nn.Module, family: ModelFamily) -> Iterator[None]:
        enable_cache(transformer, Ada(codebook=_EVERY_STEP))
        for stack in owner_of(transformer).stacks_in_use():
            stack.method.observe = self.changes.append
        try:
            yield
        finally:
            disable_cache(transformer)

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

    def excess(slope: float) -> float:
        return (shares(slope) / rate).sum() - compute_fraction

    return shares(brentq(excess, -_STEEPEST, _STEEPEST, xtol=1e-12 * _STEEPEST))
