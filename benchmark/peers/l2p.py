"""L2P (arXiv 2604.26365): every output as a learned sum of all outputs before it."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from benchmark.peers.sampler_step import Walk, combined, enabled_policy

HAND_MADE = {
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    6: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    10: (0, 1, 2, 4, 12, 24, 38),
    16: (0, 1, 2, 4, 16, 32),
}
"""Computed steps of 50, by the paper's interval N."""
EPOCHS, RATE = 200, 0.01
"""Of the paper's training by Adam."""


def hand_made(interval: int, steps: int) -> tuple[int, ...]:
    """The paper's schedule, moved to the nearest of ``steps`` steps."""
    return tuple(sorted({math.floor(place * steps / 50 + 0.5) for place in HAND_MADE[interval]}))


def even(computed: int, steps: int) -> tuple[int, ...]:
    return tuple(sorted({math.floor(k * steps / computed) for k in range(computed)}))


def schedule(options: dict[str, Any], steps: int) -> tuple[int, ...]:
    """Computed steps: hand-made for an ``interval``, else even for a ``share`` of all."""
    if "interval" in options:
        return hand_made(options["interval"], steps)
    return even(math.ceil(options["share"] * steps), steps)


def trained_weights(gram: np.ndarray, epochs: int = EPOCHS, rate: float = RATE) -> np.ndarray:
    """W [T, T], lower triangular without its diagonal: ``F_t ~ sum over j < t of W[t, j] F_j``.

    The paper's training: Adam on the mean square of all one-step forecasts of true trajectories,
    from reuse of the last output. All samples are one batch, so that their Gram matrix is enough.

    Args:
        gram: [T, T], mean products of the outputs' elements.
    """
    gram = gram / gram.diagonal().mean()
    earlier = np.tri(len(gram), k=-1)
    weights = np.eye(len(gram), k=-1)
    mean, square = np.zeros_like(gram), np.zeros_like(gram)
    for step in range(1, epochs + 1):
        gradient = 2 * (weights @ gram - gram) * earlier
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        move = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        weights = weights - rate * move * earlier
    return weights


def causal_ridge(gram: np.ndarray, ridge: float) -> np.ndarray:
    """The same in closed form: least squares of every step on all earlier ones.

    Args:
        gram: [T, T], mean products of the outputs' elements.
        ridge: of the mean diagonal of each system.
    """
    weights = np.zeros_like(gram)
    for t in range(1, len(gram)):
        past = gram[:t, :t]
        penalty = ridge * np.trace(past) / t * np.eye(t)
        weights[t, :t] = np.linalg.solve(past + penalty, gram[:t, t])
    return weights


class L2P:
    """
    Args:
        weights: [T, T], `trained_weights` or `causal_ridge`.
        steps: that are computed.
    """

    def __init__(self, weights: np.ndarray, steps: tuple[int, ...]) -> None:
        self.weights, self.steps = weights, steps
        self.history: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        return walk.index in self.steps

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.history.append(seen)

    def forecast(self, walk: Walk) -> Tensor:
        t = walk.index
        self.history.append(combined(self.weights[t, :t], self.history))
        return self.history[-1]


def _make(options: dict[str, Any], run: Any) -> L2P:
    steps = schedule(options, run.num_inference_steps)
    return L2P(np.array(run.calibration), steps)


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> list[list[float]]:
    gram = samples.gram(steps, True)[steps + 1 :, steps + 1 :]
    if "ridge" in options:
        return causal_ridge(gram, options["ridge"]).tolist()
    return trained_weights(gram).tolist()


ENABLE = {"L2P": enabled_policy(_make, raw=True)}
CALIBRATE = {"L2P": (_calibrate, ("ridge",))}
"""By method: (samples, options, steps) -> what is kept, and the options that it depends on."""
