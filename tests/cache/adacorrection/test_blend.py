"""What skipped steps should have used: blends of the refreshes around them."""

import pytest

from tests.samplers import SCHEDULERS
from xfuser_adacorr.model_executor.cache.adacorrection import make_repair
from xfuser_adacorr.model_executor.cache.adacorrection.blend import line_blend, parabola_blend

T1, T0, FRESH = 0.9, 0.8, 0.5


def blended(blend, t, value, t1=T1):
    b0, b1, b = blend(t, FRESH, T0, t1)
    return b0 * value(T0) + b1 * value(t1 or 0.0) + b * value(FRESH)


def bent(x):
    return 2 * x * x - x + 0.3


@pytest.mark.parametrize("t", [0.8, 0.73, 0.61, 0.5])
def test_blends_are_exact_for_their_order(t):
    assert blended(line_blend, t, lambda x: 3 * x - 1) == pytest.approx(3 * t - 1)
    assert blended(parabola_blend, t, bent) == pytest.approx(bent(t))


@pytest.mark.parametrize("t", [0.79, 0.6, 0.51])
def test_the_line_lies_between_cached_and_fresh(t):
    b0, b1, b = line_blend(t, FRESH, T0, T1)
    assert b1 == 0.0 and 0.0 < b < 1.0 and b0 + b == pytest.approx(1.0)


@pytest.mark.parametrize("t1", [None, 0.87])
def test_a_gap_too_long_is_not_bent(t1):
    """0.3 after 0.07: more than four times as long; or there was no gap before."""
    assert parabola_blend(0.6, FRESH, T0, t1) == line_blend(0.6, FRESH, T0, None)
    assert parabola_blend(0.6, FRESH, T0, 0.88) != line_blend(0.6, FRESH, T0, None)


def test_a_refresh_at_the_same_place_is_taken_as_it_is():
    assert parabola_blend(0.8, 0.8, 0.8, 0.9) == line_blend(0.8, 0.8, 0.8, 0.9) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "name, blend", [("DPMSolverMultistepScheduler", parabola_blend), ("DDIMScheduler", line_blend)]
)
def test_samplers_that_use_earlier_outputs_have_the_parabola(name, blend):
    found = [make for make in SCHEDULERS.values() if type(make()).__name__ == name]
    assert found and all(make_repair(make())._blend is blend for make in found)
