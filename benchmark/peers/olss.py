"""OLSS (arXiv 2305.14677): few steps, each projected onto the start and the outputs so far."""

from typing import Any

import numpy as np
from torch import Tensor

from benchmark.peers.paths import budget
from benchmark.peers.sampler_step import Walk, combined, enabled_policy

BISECTIONS = 40


def project(gram: np.ndarray, basis: list[int], target: int) -> tuple[np.ndarray, float]:
    """Least squares of vector ``target`` on those of ``basis``: weights and root of the error.

    Args:
        gram: [V, V], inner products of all vectors.
    """
    inner, aim = gram[np.ix_(basis, basis)], gram[basis, target]
    weights = np.linalg.lstsq(inner, aim, rcond=1e-13)[0]
    error = gram[target, target] - 2 * weights @ aim + weights @ inner @ weights
    return weights, float(np.sqrt(max(error, 0.0)))


def longest_jumps(gram: np.ndarray, steps: int, bound: float) -> list[int]:
    """Computed steps: each jump is the longest whose projection's error is within ``bound``.

    Vectors 0 to ``steps`` of the Gram matrix are latents, the others outputs.
    """
    path = [0]
    while True:
        basis = [0, *(steps + 1 + k for k in path)]
        for target in range(steps, path[-1], -1):
            if target == path[-1] + 1 or project(gram, basis, target)[1] <= bound:
                break
        if target == steps:
            return path
        path.append(target)


def searched_path(gram: np.ndarray, steps: int, computed: int) -> list[int]:
    """`longest_jumps` with at most so many computed steps, the bound found by bisection.

    Where no bound gives just as many, the longest gaps are halved.
    """
    low, high = 0.0, float(np.sqrt(gram.diagonal().max()))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if len(longest_jumps(gram, steps, middle)) > computed:
            low = middle
        else:
            high = middle
    path = longest_jumps(gram, steps, high)
    while len(path) < computed:
        gaps = np.diff([*path, steps])
        longest = int(gaps.argmax())
        path.insert(longest + 1, path[longest] + int(gaps[longest]) // 2)
    return path


def fitted(gram: np.ndarray, steps: int, path: list[int]) -> list[list[float]]:
    """For every jump of the path the weights of the start and of the outputs so far."""
    return [
        project(gram, [0, *(steps + 1 + j for j in path[: k + 1])], target)[0].tolist()
        for k, target in enumerate([*path[1:], steps])
    ]


class OLSS:
    """Takes the sampler's place: between two computed steps the latents stand still."""

    def __init__(self, path: list[int], weights: list[list[float]]) -> None:
        self.path, self.weights = path, weights
        self.basis: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        return walk.index in self.path

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.basis = self.basis or [walk.y]
        self.basis.append(seen)

    def next_y(self, walk: Walk) -> Tensor:
        if walk.index + 1 in (*self.path, walk.steps):
            return combined(self.weights[len(self.basis) - 2], self.basis)
        return walk.y


def _make(options: dict[str, Any], run: Any) -> OLSS:
    return OLSS(run.calibration["path"], run.calibration["weights"])


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> dict[str, Any]:
    gram = samples.gram(steps, False)
    path = searched_path(gram, steps, budget(options, steps))
    return {"path": path, "weights": fitted(gram, steps, path)}


ENABLE = {"OLSS": enabled_policy(_make, raw=False)}
CALIBRATE = {"OLSS": (_calibrate, ("share",))}
