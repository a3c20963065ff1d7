"""DPCache (arXiv 2602.22654): Taylor forecasts, and the path whose sum of their errors is least."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from benchmark.peers.paths import budget, cheapest_path_of_pairs
from benchmark.peers.sampler_step import Walk, combined, enabled_policy


def taylor_weights(anchors: Sequence[int], target: int, order: int) -> np.ndarray:
    """Weights of the values at the ``anchors`` in the Taylor polynomial about the last one.

    Derivatives are differences over the anchors' distances: ``d1 = (F_j - F_i) / (j - i)``,
    ``d2 = (d1 - d1 of the anchors before) / (j - i)``.
    """
    rows = list(np.eye(len(anchors)))
    weights, ahead, factor = rows[-1].copy(), target - anchors[-1], 1.0
    for degree in range(1, min(order, len(anchors) - 1) + 1):
        rows = [
            (later - earlier) / (anchors[k + degree] - anchors[k + degree - 1])
            for k, (earlier, later) in enumerate(pairwise(rows))
        ]
        factor *= ahead / degree
        weights += factor * rows[-1]
    return weights


def path_costs(gram: np.ndarray, order: int) -> np.ndarray:
    """[T + 1, T + 1, T + 1]: sum of the errors between j and k, forecast from anchors i and j.

    The third anchor of a second order, which the cost does not know, is the step before i. With
    i = j there is one anchor alone.

    Args:
        gram: [T, T], of the outputs of true trajectories, of mean squares.
    """
    steps = len(gram)
    costs = np.zeros((steps + 1,) * 3)
    for j in range(steps):
        for i in range(j + 1):
            anchors = [j] if i == j else [i - 1, i, j] if i and order > 1 else [i, j]
            errors = [0.0]
            for target in range(j + 1, steps):
                error = np.zeros(steps)
                error[anchors] = taylor_weights(anchors, target, order)
                error[target] -= 1.0
                near = [*anchors, target]
                square = error[near] @ gram[np.ix_(near, near)] @ error[near]
                errors.append(float(np.sqrt(max(square, 0.0))))
            costs[i, j, j + 1 :] = np.cumsum(errors)
    return costs


class DPCache:
    """
    Args:
        path: computed steps.
        order: of the forecast.
    """

    def __init__(self, path: list[int], order: int) -> None:
        self.path, self.order = path, order
        self.values: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        return walk.index in self.path

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.values = [*self.values, seen][-self.order - 1 :]

    def forecast(self, walk: Walk) -> Tensor:
        anchors = walk.computed[-len(self.values) :]
        return combined(taylor_weights(anchors, walk.index, self.order), self.values)


def _make(options: dict[str, Any], run: Any) -> DPCache:
    return DPCache(run.calibration, options["order"])


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> list[int]:
    gram = samples.gram(steps, True)[steps + 1 :, steps + 1 :]
    costs = path_costs(gram, options["order"])
    return list(cheapest_path_of_pairs(costs, budget(options, steps)))


ENABLE = {"DPCache": enabled_policy(_make, raw=True)}
CALIBRATE = {"DPCache": (_calibrate, ("share", "order"))}
