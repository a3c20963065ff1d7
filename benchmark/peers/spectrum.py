"""Spectrum (arXiv 2603.01623): Chebyshev polynomials over all computed steps, growing gaps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor

from benchmark.peers.sampler_step import Walk, combined, enabled_policy


def chebyshev_weights(
    known: Sequence[int], target: int, steps: int, degree: int, ridge: float
) -> np.ndarray:
    """Weights of the values at steps ``known`` in the forecast at ``target``.

    ``c = (X^T X + ridge I)^-1 X^T h`` with ``X[k, m] = T_m(tau_k)`` and ``tau`` from -1 to 1 over
    the run; the forecast is ``sum_m T_m(tau) c_m``.
    """
    tau = 2 * np.array([*known, target]) / steps - 1
    *design, aim = chebvander(tau, degree)
    x = np.array(design)
    return aim @ np.linalg.solve(x.T @ x + ridge * np.eye(degree + 1), x.T)


def line_weights(known: Sequence[int], target: int) -> np.ndarray:
    """Weights of the line through the last two values; of the last one if there is no other."""
    weights = np.zeros(len(known))
    weights[-1] = 1.0
    if len(known) > 1:
        ahead = (target - known[-1]) / (known[-1] - known[-2])
        weights[-1] += ahead
        weights[-2] -= ahead
    return weights


class Spectrum:
    """After ``warm_up`` steps every ``floor(window)``-th is computed; each adds ``growth`` to it.

    ``blend`` of the forecast is Chebyshev's, the rest the line's: 1 in the paper, 0.5 to 1 in its
    code's advice.
    """

    def __init__(
        self,
        *,
        warm_up: int,
        growth: float,
        window: float = 2.0,
        degree: int = 4,
        ridge: float = 0.1,
        blend: float = 1.0,
    ) -> None:
        self.warm_up, self.growth, self.window = warm_up, growth, window
        self.degree, self.ridge, self.blend = degree, ridge, blend
        self.values: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        if walk.index < self.warm_up:
            return True
        due = walk.index - walk.computed[-1] >= math.floor(self.window)
        if due:
            self.window += self.growth
        return due

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.values.append(seen)

    def forecast(self, walk: Walk) -> Tensor:
        known, target = walk.computed, walk.index
        weights = self.blend * chebyshev_weights(
            known, target, walk.steps, self.degree, self.ridge
        ) + (1 - self.blend) * line_weights(known, target)
        return combined(weights, self.values)


def _make(options: dict[str, Any], run: Any) -> Spectrum:
    return Spectrum(**options)


ENABLE = {"Spectrum": enabled_policy(_make, raw=True)}
