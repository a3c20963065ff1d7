"""Bare models: branches without names, timesteps that rise, that stay, and that differ by token."""

import logging

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, Fb, cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.sites.model import MOST_BRANCHES

LOOSE = Auto(tolerance=0.05)


@pytest.fixture(autouse=True)
def unsaid():
    warn_once.cache_clear()


def unnamed(sampler):
    """Call the model without telling which branch it is."""
    sampler.call = lambda x, t, branch="cond": sampler.transformer(
        **sampler.inputs(x, t, branch), return_dict=False
    )[0]
    return sampler


def enabled(method=LOOSE, scheduler=False):
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, method, scheduler=sampler.scheduler if scheduler else None)
    return sampler


@pytest.mark.parametrize("method", [LOOSE, Fb(threshold=0.5)], ids=["Auto", "Fb"])
def test_branches_without_names_do_not_mix(method):
    named, without = enabled(method, scheduler=True), unnamed(enabled(method, scheduler=True))
    expected = named.run(16, guidance=3.0, finish=False)
    assert torch.equal(without.run(16, guidance=3.0, finish=False), expected)
    summary = cache_summary(without.transformer)
    assert (summary.num_steps, summary.calls) == (16, 32) and summary.reused_steps > 0


def test_branches_without_names_and_without_a_scheduler_say_nothing(caplog):
    sampler = unnamed(enabled())
    with caplog.at_level(logging.WARNING):
        sampler.run(16, guidance=3.0)
    assert not caplog.records and cache_summary(sampler.transformer).reused_steps > 0


def calls(sampler, timesteps):
    """Call the bare model at these timesteps, on latents that change a little; the outputs."""
    x, outputs = sampler.noise(), []
    for t in timesteps:
        arguments = sampler.inputs(x, 0.0) | {"timestep": torch.as_tensor(t).float()}
        outputs.append(sampler.transformer(**arguments, return_dict=False)[0])
        x = x + 0.01
    return outputs


RISING = [[i / 20] for i in range(20)]
CONSTANT = [[0.0]] * 20


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [(RISING, "timesteps rise from call to call"), (CONSTANT, "16 calls at one timestep")],
    ids=["rising", "constant"],
)
def test_timesteps_that_tell_no_run_are_computed_and_told_once(caplog, timesteps, words):
    sampler = enabled()
    with caplog.at_level(logging.WARNING):
        outputs = calls(sampler, timesteps) + calls(sampler, timesteps)
    told = [record.message for record in caplog.records if words in record.message]
    assert len(told) == 1 and "give the scheduler" in told[0]
    plain = calls(FluxSampler(make_tiny_flux()), timesteps)
    pairs = zip(outputs, plain + plain, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_calls_at_one_timestep_do_not_pile_up_memory():
    sampler = enabled()
    calls(sampler, CONSTANT[:MOST_BRANCHES])
    most = cache_summary(sampler.transformer).cache_memory_bytes
    calls(sampler, CONSTANT * 2)
    assert 0 < cache_summary(sampler.transformer).cache_memory_bytes <= most


class PerToken(torch.nn.Module):
    """A model of tokens with a timestep each."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.seen = 0

    def forward(self, hidden_states, timestep):
        self.seen += 1
        return (self.blocks[0](hidden_states),)


def test_the_place_of_timesteps_by_token_is_that_of_the_noisiest():
    """As for a clip whose first frame is given: its tokens stand at 0 in every call."""
    model = enable_cache(PerToken(), Auto(tolerance=0.2))
    x = torch.ones(1, 3, 4)
    for i in range(20):
        t = 1.0 - i / 20
        model(
            hidden_states=x * (1.0 + 0.01 * i), timestep=torch.tensor([[0.0, 1000 * t, 1000 * t]])
        )
    summary = cache_summary(model)
    assert summary.calls == 20 and model.seen == summary.computed_calls < 20
    assert [call.sigma for call in summary.trace.calls] == pytest.approx(
        [1.0 - i / 20 for i in range(20)]
    )


def test_a_budget_on_a_bare_model_is_held_to_the_end():
    sampler = enabled(Auto(target_compute=0.25, num_steps=16))
    for _ in range(2):
        sampler.run(16, finish=False)
        assert cache_summary(sampler.transformer).computed_steps == 4


@pytest.mark.parametrize("method", [LOOSE, Fb(threshold=100.0)], ids=["Auto", "Fb"])
@pytest.mark.parametrize("at", [1, 8])
def test_other_conditioning_in_the_middle_is_computed(method, at):
    """As for a run that is left, and followed by one that begins at a lower noise level."""
    sampler = enabled(method)
    x, calls = sampler.noise(), []
    for i in range(16):
        if i == at:
            sampler.text["cond"] = torch.ones_like(sampler.text["cond"])
        calls.append(sampler.call(x, 1000 * (1 - i / 16)))
    found = cache_summary(sampler.transformer).trace.calls
    plain = FluxSampler(make_tiny_flux())
    plain.text["cond"] = sampler.text["cond"]
    assert found[at].refreshed
    assert torch.equal(calls[at], plain.call(x, 1000 * (1 - at / 16)))
