"""MeanCache (arXiv 2601.19961): average velocities from the way that the latents already went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from benchmark.peers.paths import budget, cheapest_path
from benchmark.peers.sampler_step import Walk, enabled_policy

SPANS = 6
"""Longest look back in steps; 1 is plain reuse."""


def edge_weights(times: Sequence[float], start: int, stop: int, span: int) -> dict[str, float]:
    """The average velocity from step ``start`` to ``stop`` as weights of "v", "v_back", "moved".

    ``v + (s - t) J`` with ``J = (y_t - y_r - (t - r) v_r) / (t - r)^2``, r lying ``span`` steps
    before t; "moved" is ``y_t - y_r``. With a span of 1 it is v alone.
    """
    if span == 1 or span > start:
        return {"v": 1.0, "v_back": 0.0, "moved": 0.0}
    ahead = times[stop] - times[start]
    back = times[start] - times[start - span]
    return {"v": 1.0, "v_back": -ahead / back, "moved": ahead / back**2}


def edge_costs(gram: np.ndarray, times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of every edge the least error of its average velocity, and the span that gives it.

    Both are [T + 1, T + 1]; an error is the root of the mean square over true trajectories.

    Args:
        gram: of latents y_0 to y_T and velocities v_0 to v_{T-1}, of mean squares.
        times: of the steps and the end.
    """
    steps = len(times) - 1
    costs, spans = np.zeros((steps + 1, steps + 1)), np.ones((steps + 1, steps + 1), dtype=int)
    for start in range(steps):
        for stop in range(start + 2, steps + 1):
            found = []
            for span in range(1, min(SPANS, max(start, 1)) + 1):
                weights = edge_weights(times, start, stop, span)
                error = np.zeros(len(gram))
                error[steps + 1 + start] += weights["v"]
                if span > 1:
                    error[steps + 1 + start - span] += weights["v_back"]
                    error[start] += weights["moved"]
                    error[start - span] -= weights["moved"]
                gone = times[stop] - times[start]
                error[stop] -= 1 / gone
                error[start] += 1 / gone
                found.append(float(np.sqrt(max(error @ gram @ error, 0.0))))
            costs[start, stop] = min(found)
            spans[start, stop] = 1 + int(np.argmin(found))
    return costs, spans


class MeanCache:
    """
    Args:
        path: computed steps.
        spans: of the edge that begins at each.
    """

    def __init__(self, path: list[int], spans: list[int]) -> None:
        self.spans = dict(zip(path, spans, strict=True))
        self.latents: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        return walk.index in self.spans

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.latents.append(walk.y)
        self.velocities.append(seen)

    def forecast(self, walk: Walk) -> Tensor:
        """The velocity of the step before, moved on by the slope over the last ``span`` steps."""
        place, y, v = walk.index, walk.y, self.velocities[-1]
        weights = edge_weights(walk.times, place, place + 1, self.spans[walk.computed[-1]])
        if weights["moved"]:
            back = place - self.spans[walk.computed[-1]]
            moved = y - self.latents[back]
            v = v + weights["v_back"] * self.velocities[back] + weights["moved"] * moved
        self.latents.append(y)
        self.velocities.append(v)
        return v


def _make(options: dict[str, Any], run: Any) -> MeanCache:
    return MeanCache(run.calibration["path"], run.calibration["spans"])


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> dict[str, Any]:
    times = samples.times(steps)
    costs, spans = edge_costs(samples.gram(steps, False), times)
    if not samples.flow:  # a predicted noise tells the velocity badly at high noise
        costs = costs * np.abs(np.subtract.outer(times, times))
    path = cheapest_path(costs ** options["exponent"], budget(options, steps))
    edges = zip(path, (*path[1:], steps), strict=True)
    return {"path": list(path), "spans": [int(spans[edge]) for edge in edges]}


ENABLE = {"MeanCache": enabled_policy(_make, raw=False)}
CALIBRATE = {"MeanCache": (_calibrate, ("share", "exponent"))}
