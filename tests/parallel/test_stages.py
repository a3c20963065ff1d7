"""One pipeline stage by itself: what it passes on, and which messages it takes."""

import math

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary
from xfuser_adacorr.core.distributed import DecisionScope, RankMismatchError
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX
from xfuser_adacorr.model_executor.cache.engine import CacheEngine
from xfuser_adacorr.model_executor.cache.methods.base import Verdict
from xfuser_adacorr.model_executor.cache.xfuser_adapters import pipefusion
from xfuser_adacorr.model_executor.cache.xfuser_adapters.pipefusion import (
    PipelineStage,
    StageClock,
)
from xfuser_adacorr.model_executor.cache.xfuser_adapters.scope import check_config


class LoneStage(PipelineStage):
    """A stage whose messages go to, and come from, lists of this process."""

    def __init__(self, *, is_first):
        super().__init__(None)
        self.sent, self.inbox, self._is_first = [], [], is_first

    is_first = property(lambda self: self._is_first)
    is_last = property(lambda self: not self._is_first)
    patch = "#0"
    first_step = 0

    def ends_warmup(self, step):
        return False

    def _tell(self, outcome, signal):
        self.sent.append((self.ticket, outcome, signal))

    def _send(self, message, rank):
        self.sent.append(tuple(message.tolist()))

    def _receive(self, message):
        return torch.tensor(self.inbox.pop(0), dtype=message.dtype)


def test_found_offsets_that_nobody_asked_for_are_skipped():
    stage = LoneStage(is_first=True)
    stage.inbox = [(3, 1.0, 2.0), (5, 4.0, 8.0), (7, 16.0, 32.0)]
    assert stage.receive_found(5) == [4.0, 8.0]
    assert stage.receive_found(7) == [16.0, 32.0]


def test_a_decision_keeps_its_ticket_and_what_it_was_taken_from():
    first, second = LoneStage(is_first=True), LoneStage(is_first=False)
    for verdict in (None, Verdict(True, 0.25), Verdict(True, None)):
        first.pass_on(verdict)
    second.inbox = list(first.sent)
    tickets = []
    for expected in (None, Verdict(True, 0.25), Verdict(True, None)):
        assert second.receive() == expected
        tickets.append(second.ticket)
    assert tickets == sorted(set(tickets))


def test_a_failure_is_raised_with_the_first_stages_words():
    stage = LoneStage(is_first=False)
    text = "rank 0 saw 0.5 µ"
    stage.inbox = [(1, pipefusion.FAILURE, len(text.encode())), tuple(text.encode())]
    with pytest.raises(RankMismatchError, match="^rank 0 saw 0.5 µ$"):
        stage.receive()


@pytest.mark.parametrize("use_cache", ["Tea", "Auto"])
def test_a_reused_call_passes_on_text_that_went_through_the_blocks(monkeypatch, use_cache):
    """xfuser sends it with the first patch; the next stage may compute another patch with it."""
    model = make_tiny_flux()
    sampler, stage = FluxSampler(model), LoneStage(is_first=True)
    monkeypatch.setattr(PipelineStage, "receive_found", lambda self, ticket: [math.nan, 1.0])
    option = {"Tea": "rel_l1_thresh", "Auto": "adacorr_tolerance"}[use_cache]
    config = CacheConfig(use_cache=use_cache, **{option: 100.0})
    clock = StageClock(lambda: sampler.scheduler, stage)
    engine = CacheEngine(model, FLUX, config, clock, DecisionScope(), stage)
    engine.install()
    returned, result = [], engine.blocks.result

    def recorded(index, out):
        if index == len(engine.blocks.stack) - 1:
            returned.append((stage.patch, out["hidden_states"], out["encoder_hidden_states"]))
        return result(index, out)

    engine.blocks.result = recorded
    sampler.scheduler.set_timesteps(6)
    for t in sampler.scheduler.timesteps[:2]:
        for patch, seed in (("#0", 1), ("#1", 2)):
            stage.patch = patch
            sampler.call(sampler.noise(seed), t)
    calls = cache_summary(model).trace.calls
    assert [(c.context, c.step_index, c.refreshed) for c in calls] == [
        ("cond#0", 0, True),
        ("cond#1", 0, True),
        ("cond#0", 1, False),
        ("cond#1", 1, False),
    ]
    for patch, hidden, text in returned[2:]:
        computed = returned[int(patch[1])]
        assert text is returned[1][2], "of the last computed call, whichever patch"
        assert hidden.shape == computed[1].shape and not torch.equal(hidden, computed[1])
    outcomes = [outcome for _, outcome, _ in stage.sent]
    assert outcomes == [pipefusion.REFRESH] * 2 + [pipefusion.REUSE] * 2


def test_what_stages_could_not_decide_alike_is_refused():
    stage = LoneStage(is_first=True)
    with pytest.raises(ValueError, match="must be one of Fb, Tea, Fast, Auto.*got Ada"):
        check_config(CacheConfig(use_cache="Ada"), DecisionScope(), stage)
    literal = CacheConfig(use_cache="Fb", enable_adacorrection=True, adacorr_mode="literal")
    with pytest.raises(ValueError, match="adacorr_mode must be 'adaptive'"):
        check_config(literal, DecisionScope(), stage)
    check_config(CacheConfig(use_cache="Fast", enable_adacorrection=True), DecisionScope(), stage)
