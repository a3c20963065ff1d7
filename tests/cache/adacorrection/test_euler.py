"""Repair of Euler steps: what skipped steps owe, and that later ones pay it."""

from itertools import pairwise

import pytest
import torch

from xfuser_adacorr.model_executor.cache.adacorrection.euler import (
    EulerRepair,
    NoRepair,
    owed,
)
from xfuser_adacorr.model_executor.cache.forecasts import Line
from xfuser_adacorr.model_executor.cache.step import Step


@pytest.mark.parametrize("sigma1", [None, 0.86])
def test_what_skipped_steps_owe_is_the_sum_over_them(sigma1):
    """For values at the refreshes, and forecasts made of them."""
    sigmas, sigma0, refreshed, v0, v1, v = [0.78, 0.75, 0.71], 0.8, 0.66, 1.3, 1.1, 1.9
    forecast, expected = Line(), 0.0
    for sigma, value in [(sigma1, v1), (sigma0, v0)] if sigma1 else [(sigma0, v0)]:
        forecast.update(Step(0, sigma, sigma, 9), torch.tensor(value, dtype=torch.float64))
    for s, end in zip(sigmas, [0.75, 0.71, 0.66], strict=True):
        should = v0 + (sigma0 - s) / (sigma0 - refreshed) * (v - v0)
        slope = 0.0 if sigma1 is None else (v0 - v1) / (sigma0 - sigma1)
        expected += (end - s) * (should - (v0 + (s - sigma0) * slope))
    skipped = [Step(1, s, s, 8) for s in sigmas]
    found = owed(
        skipped, Step(4, refreshed, 0.6, 5), torch.tensor(v, dtype=torch.float64), forecast
    )
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.79, 0.7, 0.6, 0.51])
def test_the_blend_lies_between_cached_and_fresh(sigma):
    """What one skipped step should have used: its debt plus the forecast that it was given."""
    forecast, cached, fresh = Line(), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    forecast.update(Step(0, 0.8, sigma, 9), cached)
    debt = owed([Step(1, sigma, 0.5, 8)], Step(2, 0.5, 0.4, 7), fresh, forecast)
    blend = debt / (0.5 - sigma) + cached
    assert blend.min() >= 0.0 and float(blend.sum()) == pytest.approx(1.0)
    assert float(blend[1]) == pytest.approx((0.8 - sigma) / 0.3, rel=1e-4)


SIGMAS = [1.0, 0.93, 0.84, 0.72, 0.6, 0.41, 0.2, 0.0]


def sample(velocity, computed, repair):
    """Euler steps with the skipped ones forecast; every payment as the repair has it."""
    x, forecast = torch.zeros(3, dtype=torch.float64), Line()
    for i, (sigma, after) in enumerate(pairwise(SIGMAS)):
        step = Step(i, sigma, after, len(SIGMAS) - 1 - i)
        if i in computed:
            fresh = velocity(sigma)
            used = repair.pay(step, fresh, forecast)
            forecast.update(step, fresh)
        else:
            used = forecast(step)
            repair.owe(step)
        x = x + (after - sigma) * used
    return x


def linear(sigma):
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * sigma + 0.3


def plain():
    return sample(linear, range(7), NoRepair())


@pytest.mark.parametrize("computed", [(0, 3, 5), (0, 2, 4, 5), (0, 1, 4, 5), (0, 5)])
def test_outputs_linear_in_sigma_are_repaired_exactly(computed):
    torch.testing.assert_close(sample(linear, computed, EulerRepair()), plain())
    if computed[1] > 1:  # before the second refresh only the last value can stand in
        assert not torch.allclose(sample(linear, computed, NoRepair()), plain(), rtol=1e-3)


def test_the_remainder_of_a_guessed_step_is_paid_at_the_next_refresh():
    """A payment over a step that was guessed to end at 0.5, and ended at 0.4."""
    repair, forecast = EulerRepair(), Line()
    v0, v, after = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 3.0)
    forecast.update(Step(0, 0.9, 0.8, 5, exact=False), v0)
    repair.owe(Step(1, 0.8, 0.7, 4, exact=False))
    payer = Step(2, 0.6, 0.5, 3, exact=False)
    payment = repair.pay(payer, v, forecast) - v
    owed = (0.6 - 0.8) * (1.0 / 3.0) * (v - v0)  # the blend has a third of the way at 0.8
    torch.testing.assert_close(payment, owed / (0.5 - 0.6))
    forecast.update(payer, v)
    paid = repair.pay(Step(3, 0.4, 0.2, 2, exact=False), after, forecast) - after
    torch.testing.assert_close(paid, (0.5 - 0.4) * payment / (0.2 - 0.4))


def test_the_last_step_pays_nothing():
    """Nothing could follow it: its output is the fresh one."""
    repair, forecast = EulerRepair(), Line()
    v0, v = torch.ones(3), torch.full((3,), 2.0)
    forecast.update(Step(0, 0.9, 0.6, 3), v0)
    repair.owe(Step(1, 0.6, 0.3, 2))
    assert repair.pay(Step(2, 0.3, 0.0, 1), v, forecast) is v


def test_a_refresh_without_debt_is_the_output_itself():
    repair, forecast, v = EulerRepair(), Line(), torch.ones(3)
    forecast.update(Step(0, 0.9, 0.6, 3), v)
    assert repair.pay(Step(1, 0.6, 0.3, 2), v, forecast) is v
    assert repair.tensors() == []


@pytest.mark.parametrize("lost", [True, False])
def test_nothing_is_paid_where_the_forecast_is_lost(lost):
    repair, forecast = EulerRepair(), Line()
    v0, v = torch.ones(3), torch.full((3,), 2.0)
    forecast.update(Step(0, 0.9, 0.8, 4), v0)
    repair.owe(Step(1, 0.8, 0.6, 3))
    forecast.lost = torch.tensor(lost)
    paid = repair.pay(Step(2, 0.6, 0.3, 2), v, forecast)
    assert torch.equal(paid, v) is lost
    assert repair.pay(Step(3, 0.3, 0.1, 2), v, forecast) is v


def test_steps_of_length_zero_pay_nothing():
    repair, forecast, v = EulerRepair(), Line(), torch.ones(3)
    forecast.update(Step(0, 0.9, 0.6, 4), v)
    repair.owe(Step(1, 0.6, 0.5, 3))
    assert repair.pay(Step(2, 0.5, 0.5, 2), 2 * v, forecast).isfinite().all()
