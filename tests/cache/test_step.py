"""Places inferred from the timesteps that a bare model is called with."""

import pytest

from xfuser_adacorr.model_executor.cache.step import Step, step_from_timestep


def test_defaults_are_those_of_flow_matching():
    step = Step(2, 0.7, 0.55, 3)
    assert (step.coordinate, step.step_gain, step.is_last) == (0.7, pytest.approx(0.15), False)
    assert Step(4, 0.1, 0.0, 1).is_last


def walk(timesteps, num_steps=None):
    last, steps = None, []
    for calls, t in enumerate(timesteps):
        last = step_from_timestep(calls, t, last, num_steps)
        steps.append(last)
    return steps


def test_the_next_level_is_guessed_from_the_last_step():
    steps = walk([1.0, 0.9, 0.7])
    assert [step.sigma_next for step in steps] == pytest.approx([1.0, 0.8, 0.5])
    assert not any(step.exact for step in steps)


def test_counted_steps_have_an_end():
    assert [step.remaining for step in walk([1.0, 0.8, 0.6, 0.4, 0.2], 5)] == [5, 4, 3, 2, 1]


def test_the_end_is_guessed_from_equal_steps():
    """From the second call on: the number of guessed steps that reach 0."""
    assert [s.remaining for s in walk([1.0, 0.8, 0.6, 0.4, 0.2])] == [2, 4, 3, 2, 1]
