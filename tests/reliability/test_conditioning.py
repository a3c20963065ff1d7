"""Conditioning that changes is computed in any place; found by fuzz, kept as small cases."""

import logging

import pytest
import torch

from tests.reliability.test_fuzz_calls import (
    METHODS,
    PLAIN,
    SCHEDULERS,
    BarePlayer,
    Player,
    enabled,
)
from tests.reliability.toy import WIDTH, Toy
from xfuser_adacorr import Auto, cache_summary
from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.run import Slot

ALL = pytest.mark.parametrize("name", METHODS)


@torch.no_grad()
def played(name, runs, sampler=None):
    """Play the runs on a cached `Toy`, whose every answer is checked; the number of its calls."""
    torch.manual_seed(0)
    make = Player if sampler else BarePlayer
    player = make(Toy(), SCHEDULERS[sampler]() if sampler else None)
    with enabled(player.model, METHODS[name](), player.scheduler):
        for run in runs:
            player.play({**PLAIN, **run}, cached=True)
    return player.model.computed


@ALL
def test_conditioning_that_changes_after_a_change_of_shape_is_computed(name):
    """The shape tells nothing of what is constant."""
    for at in (1, 2, 4):
        played(name, [{"steps": 9, "cropped_at": at, "changed_at": at + 1}], sampler="ancestral")


@ALL
@pytest.mark.parametrize("sampler", [None, "flow"])
def test_conditioning_that_changes_twice_in_a_row_is_computed(name, sampler):
    for at in (2, 4):
        played(name, [{"steps": 9, "changed_at": at, "changes": 3}], sampler)


@ALL
def test_conditioning_that_changes_within_a_step_of_heun_is_computed(name):
    """Its second call of a step follows the first one, but not into stale values."""
    for at in (3, 4, 7):
        played(name, [{"steps": 5, "changed_at": at}], sampler="heun")


@ALL
@pytest.mark.parametrize("ones", [1, 3])
def test_runs_of_one_step_on_a_bare_model_teach_nothing(name, ones):
    """They are taken for branches of the run that follows, as calls at one timestep."""
    one = {"steps": 1, "named": False}
    for at in (1, 2, 3):
        for late in (None, 1):
            branches = ("cond",) if late is None else ("cond", "uncond")
            changed = {"steps": 9, "named": False, "changed_at": at, "late": late}
            played(name, [one] * ones + [changed | {"branches": branches}])


class Told(Toy):
    """A `Toy` that is told more of each step than the timestep."""

    def forward(self, hidden_states, timestep, text, extra):
        return super().forward(hidden_states, timestep, text)


@torch.no_grad()
def computed_with(extra):
    """The steps of 9 that a bare model computes, called with ``extra(i)``."""
    model, text = Told(), torch.ones(1, 3, WIDTH)
    with enabled(model, Auto(tolerance=1e6), None):
        for i in range(9):
            timestep = torch.full((1,), 1.0 - i / 9)
            model(
                hidden_states=torch.ones(1, 2, WIDTH), timestep=timestep, text=text, extra=extra(i)
            )
        calls = cache_summary(model).trace.calls
    return [call.step_index for call in calls if call.refreshed]


def test_numbers_of_a_step_refresh_nothing_on_a_bare_model():
    """A second timestep, a noise level: they are new in every call."""
    constant = computed_with(lambda i: None)
    assert len(constant) < 6
    assert computed_with(lambda i: torch.full((1,), 0.1 * i)) == constant
    assert computed_with(lambda i: 0.1 * i) == constant
    assert computed_with(lambda i: torch.ones(1, 3, WIDTH)) == constant  # equal, made anew


def test_tensors_that_are_new_in_every_call_of_a_bare_model_are_computed_and_told(caplog):
    """Nothing tells them from conditioning that changes: pictures for a control, say."""
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert computed_with(lambda i: torch.full((1, 3, WIDTH), float(i))) == list(range(9))
        computed_with(lambda i: torch.full((1, 3, WIDTH), float(i)))
    told = [r.message for r in caplog.records if "computed every step" in r.message]
    assert len(told) == 1 and "inputs" in told[0] and "scheduler" in told[0]


def test_what_is_constant_is_learned_of_each_argument_by_itself():
    text, other = torch.ones(2), torch.zeros(2)
    given = [
        {"x": torch.ones(1, 3), "text": text},
        {"x": torch.ones(1, 2), "text": text},
        {"x": torch.ones(1, 2), "text": text, "hint": other},
        {"x": torch.ones(1, 2), "text": text, "hint": other},
        {"x": torch.ones(1, 2), "text": other, "hint": other},
    ]
    slot = Slot()
    assert [slot.follows((), each) for each in given] == [False, False, False, True, False]
