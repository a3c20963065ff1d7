"""One pipeline stage by itself: what it passes on, and which messages it takes."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX
from xfuser_adacorr.model_executor.cache.methods.base import Decision
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope, RankMismatchError
from xfuser_adacorr.model_executor.cache.schedulers import read_places
from xfuser_adacorr.model_executor.cache.xfuser_adapters import pipefusion
from xfuser_adacorr.model_executor.cache.xfuser_adapters.last_stage import LastStageSteps
from xfuser_adacorr.model_executor.cache.xfuser_adapters.pipefusion import PipelineStage
from xfuser_adacorr.model_executor.cache.xfuser_adapters.scope import check_method
from xfuser_adacorr.model_executor.cache.xfuser_adapters.staged import StagedSite


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
    decisions = [
        Decision(True, "offset"),
        Decision(False, "reuse", base_signal=0.25),
        Decision(False, "reuse"),
    ]
    for decision in decisions:
        first.pass_on(decision)
    second.inbox = list(first.sent)
    tickets = []
    for decision in decisions:
        received = second.receive()
        assert received.compute == decision.compute
        assert received.why == ("stage" if decision.compute else "reuse")
        assert received.base_signal == decision.base_signal
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
    site = StagedSite(config, model, FLUX, lambda: [sampler.scheduler], DecisionScope(), stage)
    site.install()
    returned, runner = [], site.stack.runner
    result = runner.result

    def recorded(index, out):
        if index == len(runner.stack) - 1:
            returned.append((stage.patch, out["hidden_states"], out["encoder_hidden_states"]))
        return result(index, out)

    runner.result = recorded
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
    def check(name, **options):
        check_method(CacheConfig.from_name(name, **options), DecisionScope(), stage)

    stage = LoneStage(is_first=True)
    with pytest.raises(ValueError, match="must be one of Fb, Tea, Fast, Auto.*got Ada"):
        check("Ada")
    with pytest.raises(ValueError, match="adacorr_mode must be 'adaptive'"):
        check("Fb+AdaCorrection", adacorr_mode="literal")
    with pytest.raises(ValueError, match="target_compute must be None under PipeFusion"):
        check("Auto", target_compute=0.5)
    check("Fast+AdaCorrection")


def flow_solver():
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def test_the_last_stage_repairs_skipped_steps_of_a_multistep_sampler():
    """An output linear in sigma is found again exactly, whatever stood in for it."""
    a, b, noise = torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    skipped, ends = {2, 3, 5}, []
    for staged in (False, True):
        scheduler = flow_solver()
        scheduler.set_timesteps(8)
        places = read_places(scheduler, latents_known=False).steps
        steps = LastStageSteps(scheduler) if staged else None
        x = noise
        for place, t in zip(places, scheduler.timesteps, strict=True):
            output = a + b * place.coordinate
            if staged:
                steps.called(place, place.index not in skipped)
                output = torch.zeros_like(a) if place.index in skipped else output
            x = scheduler.step(output, t, x, return_dict=False)[0]
        ends.append(x)
        if staged:
            steps.release()
            assert type(scheduler) is DPMSolverMultistepScheduler
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def test_steps_of_patches_are_left_to_the_sampler():
    x, output = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    plain, taken = flow_solver(), flow_solver()
    for scheduler in (plain, taken):
        scheduler.set_timesteps(4)
    LastStageSteps(taken)
    expected, found = (each.step(output, each.timesteps[0], x)[0] for each in (plain, taken))
    assert torch.equal(found, expected)
