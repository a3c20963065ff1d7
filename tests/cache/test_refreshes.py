"""Sets of refreshed steps: given, evenly spaced, moved to other noise levels."""

import pytest

from xfuser_adacorr.model_executor.cache.refreshes import (
    checked_schedule,
    evenly_spaced,
    interpolated_steps,
    refreshed_steps,
)

STEPS = 12
LISTED = (0, 1, 4, 5, 9)


@pytest.mark.parametrize("num_steps", [1, 7, 20, 28])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_every_nth_step_is_foras_set(interval, num_steps):
    """FORA counts the steps down to 0: the first, and those whose countdown is divisible by N."""
    countdown = range(num_steps - 1, -1, -1)
    fora = {i for i, left in enumerate(countdown) if i == 0 or left % interval == 0}
    assert refreshed_steps(checked_schedule(interval), num_steps) == fora


def test_lists_and_masks_name_the_same_steps():
    mask = [step in LISTED for step in range(STEPS)]
    for given in (LISTED, LISTED[1:], list(reversed(LISTED)), mask):
        assert refreshed_steps(checked_schedule(given), STEPS) == set(LISTED)
    assert refreshed_steps(checked_schedule([]), STEPS) == {0}


def test_interpolated_steps_by_hand():
    own = [1.0, 0.75, 0.5, 0.25]
    eighths = [1.0 - i / 8 for i in range(8)]
    # 0 and 2 of 4: levels 1 and 0.5; 4 of 8 at 1, 5/6, 2/3, 1/2, nearest 1, 7/8, 5/8, 4/8
    assert interpolated_steps([0, 2], own, eighths) == (0, 1, 3, 4)
    assert interpolated_steps([0], own, eighths) == (0, 1)
    assert interpolated_steps([0, 1, 2, 3], own, [1.0, 0.5]) == (0, 1)


def test_even_spacing_on_an_axis():
    assert evenly_spaced([float(i) for i in range(13)], 4) == (0, 4, 8, 12)
    assert evenly_spaced([0.0, 1.0, 2.0, 10.0], 3) == (0, 2, 3)
    assert evenly_spaced([1.0, 0.5], 1) == (0,)
