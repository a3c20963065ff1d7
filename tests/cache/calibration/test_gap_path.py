"""Schedules from the uncached trajectories alone: the costs written out, and the path exact."""

from itertools import combinations, pairwise

import numpy
import pytest
import torch

from xfuser_adacorr.model_executor.cache.calibration.gap_path import cheapest_schedule, gap_costs


def gram_of(moves):
    return torch.einsum("kad,kbd->kab", moves, moves)


def test_a_gap_costs_what_two_velocities_leave_of_its_way():
    torch.manual_seed(0)
    moves = torch.randn(1, 7, 40).double()
    found = gap_costs(gram_of(moves))
    x = moves[0].numpy()
    way, whole = x[3:6].sum(axis=0), x.sum(axis=0)
    left = way - x[[1, 3]].T @ numpy.linalg.lstsq(x[[1, 3]].T, way, rcond=None)[0]
    wanted = numpy.linalg.norm(left) / numpy.linalg.norm(whole)
    assert found[1, 3, 6].item() == pytest.approx(wanted, rel=1e-3)
    first = x[:2].sum(axis=0)
    left = first - x[0] * (x[0] @ first) / (x[0] @ x[0])
    assert found[0, 0, 2].item() == pytest.approx(
        numpy.linalg.norm(left) / numpy.linalg.norm(whole), rel=1e-3
    )


def test_velocities_linear_in_time_cost_nothing_from_the_second_refresh_on():
    torch.manual_seed(1)
    a, b = torch.randn(2, 3, 1, 40).double().unbind(0)
    found = gap_costs(gram_of(a + b * torch.arange(8.0).double()[:, None]))
    known = [found[p, i, j].item() for p, i, j in combinations(range(9), 3) if i < 8]
    assert max(known) < 1e-2
    assert found[0, 0, 8] > 10.0 * max(known)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_path_is_the_cheapest_of_all(power):
    torch.manual_seed(2)
    costs = torch.rand(7, 7, 8).double()

    def whole(schedule):
        gaps = list(pairwise([0, *schedule, 7]))
        return sum(costs[p, i, j].item() ** power for (p, i), (_, j) in pairwise(gaps))

    everything = [(0, *rest) for rest in combinations(range(1, 7), 3)]
    assert cheapest_schedule(costs, 4, power) == min(everything, key=whole)
    assert cheapest_schedule(costs, 1) == (0,)
