"""Schedules out of the uncached trajectories alone, without a call of the model.

A gap costs what the best combination of two velocities, at its start and at the refresh before,
leaves of the way across it. The schedule whose gaps cost least in sum is found exactly, as the
shortest path over pairs of refreshes. (Costs over three refreshes: arXiv 2602.22654; paths over
gaps: arXiv 2601.19961.) It leaves out what errors do to later velocities: a start for a search.
"""

import torch
from torch import Tensor

from .learned_fit import RIDGE


def gap_costs(gram: Tensor) -> Tensor:
    """``[N, N, N + 1]``: cost of the gap from step i to j with the refresh before at step p, at
    ``[p, i, j]``; ``[0, 0, j]`` is of the first gap, and what cannot be is infinite.

    ``gram`` ``[K, N, N]`` float64 holds the inner products of the moves ``y_{j+1} - y_j`` of each
    uncached run. The cost is the geometric mean over samples of the relative error.
    """
    count, steps = len(gram), gram.shape[-1]
    gram = gram / gram.sum(dim=(1, 2), keepdim=True)  # squared way from the first to the last
    with_way = torch.zeros(count, steps, steps + 1, dtype=gram.dtype)
    with_way[:, :, 1:] = gram.cumsum(dim=2)  # <move_a, y_j - y_0>
    ways = torch.zeros(count, steps + 1, steps + 1, dtype=gram.dtype)
    ways[:, 1:] = with_way.cumsum(dim=1)  # <y_i - y_0, y_j - y_0>
    squared = ways.diagonal(dim1=1, dim2=2)
    costs = torch.full((steps, steps, steps + 1), torch.inf, dtype=gram.dtype)
    for i in range(steps):
        before, after = slice(0, max(i, 1)), slice(i + 1, steps + 1)
        wanted = with_way[:, :, after] - with_way[:, :, i : i + 1]
        energy = squared[:, after] - 2.0 * ways[:, i, after] + squared[:, i : i + 1]
        pp = gram.diagonal(dim1=1, dim2=2)[:, before, None]
        pi, ii = gram[:, before, i, None], gram[:, i, i, None, None]
        p_way, i_way = wanted[:, before], wanted[:, i, None]
        of_p, of_i = _two(pp, pi, ii, p_way, i_way) if i else (0.0, _one(ii, i_way))
        left = energy[:, None] - 2.0 * (of_p * p_way + of_i * i_way)
        left = left + of_p**2 * pp + 2.0 * of_p * of_i * pi + of_i**2 * ii
        costs[before, i, after] = left.clamp(min=1e-12).log().mean(dim=0).div(2.0).exp()
    return costs


def _two(pp: Tensor, pi: Tensor, ii: Tensor, p_way: Tensor, i_way: Tensor) -> tuple[Tensor, Tensor]:
    """The two weights that fit all samples best, written out."""
    pp, pi, ii, p_way, i_way = (each.sum(dim=0) for each in (pp, pi, ii, p_way, i_way))
    pull = RIDGE * (pp + ii) / 2.0
    pp, ii = pp + pull, ii + pull
    determinant = pp * ii - pi**2
    return (ii * p_way - pi * i_way) / determinant, (pp * i_way - pi * p_way) / determinant


def _one(ii: Tensor, i_way: Tensor) -> Tensor:
    return i_way.sum(dim=0) / ii.sum(dim=0)


def cheapest_schedule(costs: Tensor, count: int, power: float = 1.0) -> tuple[int, ...]:
    """The ``count`` steps, step 0 among them, whose gaps have the least sum of costs^``power``."""
    steps = len(costs)
    costs = (costs**power).tolist()
    best = {(0, 0): (0.0, (0,))}
    """(refresh before, last refresh) -> the least cost so far, and its steps."""
    for _ in range(count - 1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (p, i), (cost, chosen) in best.items():
            for j in range(i + 1, steps):
                whole = cost + costs[p][i][j]
                if whole < longer.get((i, j), (float("inf"),))[0]:
                    longer[i, j] = whole, (*chosen, j)
        best = longer
    return min((cost + costs[p][i][steps], chosen) for (p, i), (cost, chosen) in best.items())[1]
