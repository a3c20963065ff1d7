"""Searches for the steps to compute, at a given number of them."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

SHARES = (0.166, 0.2, 0.25, 0.35, 0.5, 0.54)
"""Of the steps that are computed, in sweeps: the first is 5 of 28 or 30."""
Mask = tuple[int, ...]
"""Computed steps in ascending order."""


def budget(options: dict[str, Any], steps: int) -> int:
    """How many steps a ``share`` of them is, rounded up."""
    return math.ceil(options["share"] * steps)


def cheapest_path(cost: np.ndarray, edges: int) -> Mask:
    """Nodes but the last of the path from the first to the last node with the least sum.

    Args:
        cost: [N, N], of the edge from i to a later j.
        edges: of the path, at most N - 1.
    """
    nodes = len(cost)
    best = np.full(nodes, np.inf)
    best[0] = 0.0
    before = []
    for _ in range(edges):
        total = best[:, None] + np.where(np.tri(nodes, dtype=bool), np.inf, cost)
        before.append(total.argmin(0))
        best = total.min(0)
    path = [nodes - 1]
    for parents in reversed(before):
        path.append(int(parents[path[-1]]))
    return tuple(path[:0:-1])


def cheapest_path_of_pairs(cost: np.ndarray, edges: int) -> Mask:
    """As `cheapest_path`, where an edge's cost depends on the node before it too.

    Args:
        cost: [N, N, N], of the edge from j to a later k after the edge from i to j; i = j where
            there is none before.
        edges: of the path, at most N - 1.
    """
    nodes = len(cost)
    later = np.triu(np.ones((nodes, nodes), dtype=bool), 1)
    best = np.full((nodes, nodes), np.inf)  # of paths that end with the edge from i to j
    best[0, 0] = 0.0
    before = []
    for _ in range(edges):
        total = best[:, :, None] + np.where(later[None], cost, np.inf)
        before.append(total.argmin(0))
        best = total.min(0)
    end = nodes - 1
    start = int(best[:, end].argmin())
    path = [end, start]
    for parents in reversed(before[1:]):
        path.append(int(parents[path[-1], path[-2]]))
    return tuple(path[:0:-1])


HOT, COLD = 0.25, 5e-5
"""Temperatures at the start and the end of an annealing, as shares of the first mask's score.

BudCache's 0.05 and 1e-5 are for squared errors of about 0.2; small pipelines have a hundredth.
"""
NEAR = 3


def annealed_mask(
    score: Callable[[Mask], float],
    start: Mask,
    steps: int,
    iterations: int,
    forced: Collection[int] = (0,),
    climbs: int = 1,
    seed: int = 0,
) -> Mask:
    """The best mask found by simulated annealing, then hill climbing.

    Of the moves 90 % are of one computed step, of those 70 % by at most `NEAR`; the others are of
    two.

    Args:
        score: what is to be small.
        start: where to begin.
        steps: of the run.
        iterations: masks that the annealing tries.
        forced: steps that stay computed.
        climbs: most rounds of the hill climbing, which moves every step by one.
    """
    random = np.random.default_rng(seed)

    def moved(mask: Sequence[int]) -> list[int]:
        movable = [step for step in mask if step not in forced]
        free = [step for step in range(steps) if step not in mask]
        if not movable or not free:
            return list(mask)
        chosen = int(random.choice(movable))
        near = [step for step in free if abs(step - chosen) <= NEAR]
        aims = near if near and random.random() < 0.7 else free
        return sorted({*mask} - {chosen} | {int(random.choice(aims))})

    current = best = start
    first = value = least = score(start)
    for step in range(iterations):
        temperature = first * HOT * (COLD / HOT) ** (step / max(1, iterations - 1))
        tried = moved(current)
        if random.random() < 0.1:
            tried = moved(tried)
        found = score(tuple(tried))
        if found < value or random.random() < math.exp(-(found - value) / temperature):
            current, value = tuple(tried), found
        if found < least:
            best, least = tuple(tried), found
    for _ in range(climbs):
        before = best
        for place in range(len(start)):
            for aim in (best[place] - 1, best[place] + 1):
                if best[place] in forced or aim in best or not 0 <= aim < steps:
                    continue
                tried = tuple(sorted({*best} - {best[place]} | {aim}))
                found = score(tried)
                if found < least:
                    best, least = tried, found
                    break
        if best == before:
            break
    return best
