"""The fit of learned correction against its formulas, and where it has to be exact."""

import numpy
import pytest
import torch

from xfuser_adacorr.model_executor.cache.calibration.learned_fit import (
    ScheduleFit,
    adams_bashforth,
    fit_gap,
)

TIMES = [1.0, 0.93, 0.81, 0.74, 0.6, 0.52, 0.37, 0.2, 0.11, 0.0]


def test_adams_bashforth_integrates_a_line_exactly():
    a, b = 0.7, -1.9

    def value(t):
        return a + b * t

    def integral(t):
        return a * t + b * t**2 / 2

    weights = adams_bashforth([1.0, 0.8, 0.5], 0.1)
    found = sum(w * value(t) for w, t in zip(weights, [1.0, 0.8, 0.5], strict=True))
    assert weights[0] == 0.0
    assert found == pytest.approx(integral(0.1) - integral(0.5), abs=1e-12)


def test_adams_bashforth_of_one_velocity_is_euler():
    assert adams_bashforth([0.9], 0.6) == [pytest.approx(-0.3)]


def test_two_steps_at_one_time_are_euler():
    assert adams_bashforth([0.9, 0.9], 0.6) == [0.0, pytest.approx(-0.3)]


def sums_of(u, r):
    """Inner products of u ``[K, M, D]`` and r ``[K, D]``."""
    return (
        torch.einsum("imd,ind->imn", u, u),
        torch.einsum("imd,id->im", u, r),
        torch.einsum("id,id->i", r, r),
    )


def test_equal_weights_are_ridge_regression():
    torch.manual_seed(0)
    u, r = torch.randn(3, 4, 50).double(), torch.randn(3, 50).double()
    found = fit_gap(*sums_of(u, r), ridge=1e-2, rounds=1)
    x = u.transpose(1, 2).reshape(-1, 4).numpy()
    gram = x.T @ x
    pull = 1e-2 * numpy.trace(gram) / 4
    wanted = numpy.linalg.solve(gram + pull * numpy.eye(4), x.T @ r.reshape(-1).numpy())
    numpy.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10)


def test_weights_are_one_over_the_error():
    """The second round of two samples, written out."""
    torch.manual_seed(1)
    u, r = torch.randn(2, 1, 30).double(), torch.randn(2, 30).double()
    r[1] *= 5.0
    found = fit_gap(*sums_of(u, r), ridge=0.0, rounds=2)
    u, r = u[:, 0].numpy(), r.numpy()
    first = (u * r).sum() / (u * u).sum()
    errors = ((r - first * u) ** 2).sum(axis=1)
    w = 1.0 / (errors + 0.01 * errors.mean())
    wanted = (w * (u * r).sum(axis=1)).sum() / (w * (u * u).sum(axis=1)).sum()
    assert found.item() == pytest.approx(wanted, rel=1e-10)


def test_a_sample_that_nothing_fits_does_not_spoil_the_others():
    torch.manual_seed(2)
    u = torch.randn(9, 2, 40).double()
    r = 0.3 * u[:, 0] - 0.8 * u[:, 1] + 0.01 * torch.randn(9, 40).double()
    r[4] = 10.0 * torch.randn(40).double()
    weighted = fit_gap(*sums_of(u, r), ridge=0.0)
    equal = fit_gap(*sums_of(u, r), ridge=0.0, rounds=1)
    wanted = torch.tensor([0.3, -0.8], dtype=torch.float64)
    assert (weighted - wanted).norm() < 0.2 * (equal - wanted).norm()


def closed_loop(schedule, velocity, uncached, ridge=1e-12, fitted=None):
    """Fit along the trajectory; the fit and the final y."""
    fit = ScheduleFit(schedule, TIMES, fitted, ridge)
    y = uncached[0]
    for k, step in enumerate(schedule):
        fit.refresh(y, velocity(y, step))
        fit.fit(k, uncached[fit.anchors[k]])
        y = y + fit.move(k)
    return fit, y


def euler_run(velocity, start):
    """An uncached run by Euler steps."""
    latents = [start]
    for step in range(len(TIMES) - 1):
        change = (TIMES[step + 1] - TIMES[step]) * velocity(latents[-1], step)
        latents.append(latents[-1] + change)
    return latents


def test_velocities_linear_in_time_are_followed_exactly():
    """From the second refresh on there are two of them, which is all that there is to know."""
    torch.manual_seed(3)
    a, b, start = torch.randn(3, 4, 60).unbind(0)

    def velocity(y, step):
        return a + b * TIMES[step]

    uncached = euler_run(velocity, start)
    _, final = closed_loop((0, 2, 6), velocity, uncached)
    torch.testing.assert_close(final, uncached[-1], rtol=0, atol=1e-4)


def test_a_linear_equation_is_solved_far_better_than_by_its_prior():
    """dy/dt = A y, whose velocities leave the span of the first ones."""
    torch.manual_seed(4)
    matrix, start = torch.randn(60, 60) / 8.0, torch.randn(4, 60)

    def velocity(y, step):
        return y @ matrix

    uncached = euler_run(velocity, start)
    schedule = (0, 2, 4, 6)
    _, final = closed_loop(schedule, velocity, uncached, ridge=1e-6)
    y, seen = start, []
    for k, step in enumerate(schedule):
        seen.append(velocity(y, step))
        end = TIMES[(*schedule[1:], len(TIMES) - 1)[k]]
        weights = adams_bashforth([TIMES[s] for s in schedule[: k + 1]], end)
        y = y + sum(w * u for w, u in zip(weights, seen, strict=True))
    error, prior_error = (final - uncached[-1]).norm(), (y - uncached[-1]).norm()
    assert error < 0.5 * prior_error


def test_a_shared_beginning_gives_the_same_fit():
    torch.manual_seed(5)
    matrix, start = torch.randn(30, 30) / 6.0, torch.randn(3, 30)

    def velocity(y, step):
        return y @ matrix

    uncached = euler_run(velocity, start)
    known, _ = closed_loop((0, 2, 4, 7), velocity, uncached, 1e-4)
    whole, final = closed_loop((0, 2, 5, 8), velocity, uncached, 1e-4)
    fit = ScheduleFit((0, 2, 5, 8), TIMES, None, 1e-4)
    assert fit.begin_as(known) == 2
    y = start
    for k in range(4):
        if k >= 2:
            fit.refresh(y, velocity(y, fit.schedule[k]))
        fit.fit(k, uncached[fit.anchors[k]])
        y = fit.latents[k] + fit.move(k)
    assert fit.coefficients == whole.coefficients
    assert torch.equal(y, final)


def test_samples_held_out_do_not_move_the_fit():
    torch.manual_seed(6)
    matrix, start = torch.randn(30, 30) / 6.0, torch.randn(5, 30)

    def velocity(y, step):
        return y @ matrix

    uncached = euler_run(velocity, start)
    few = [y[:3] for y in uncached]
    fitted = torch.tensor([True, True, True, False, False])
    alone, _ = closed_loop((0, 3, 6), velocity, few, 1e-4)
    beside, _ = closed_loop((0, 3, 6), velocity, uncached, 1e-4, fitted)
    numpy.testing.assert_allclose(
        numpy.concatenate(beside.coefficients), numpy.concatenate(alone.coefficients), rtol=1e-6
    )


def test_what_is_not_finite_is_refused():
    fit = ScheduleFit((0, 3), TIMES)
    bad = torch.zeros(2, 5)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="velocities at step 0 are not finite for sample 1"):
        fit.refresh(torch.zeros(2, 5), bad)
