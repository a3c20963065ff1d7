"""What recorders take down in full runs, and what is fitted to it."""

import numpy as np
import pytest
import torch

from tests.pipelines import CASES, run
from tests.published_ada import EVERY_STEP, PublishedRule, flux_reference
from tests.published_ada import STEPS as ADA_STEPS
from tests.tiny import all_blocks, euler
from tests.tiny_families import FAMILIES, FamilySampler
from xfuser_adacorr.model_executor.cache.calibration.ada import (
    fit_codebook,
    recorded_changes,
    step_shares,
)
from xfuser_adacorr.model_executor.cache.calibration.fast import FastRecorder, LinearMapFit
from xfuser_adacorr.model_executor.cache.calibration.recording import recorded
from xfuser_adacorr.model_executor.cache.calibration.tea import TeaRecorder, fit_polynomial
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import find_family

STEPS = 5
each_unmasked = pytest.mark.parametrize(
    "tiny", [tiny for tiny in FAMILIES if "masked" not in tiny.name], ids=lambda tiny: tiny.name
)


# -- Tea -----------------------------------------------------------------------------------------


def test_tea_fit_recovers_a_polynomial():
    truth = np.polynomial.Polynomial([0.01, 0.5, -0.3, 2.0, 1.0])
    polynomial = fit_polynomial([(x, float(truth(x))) for x in np.linspace(0.02, 0.6, 40)])
    assert polynomial.domain == pytest.approx((0.02, 0.6))
    for x in (0.05, 0.2, 0.5):
        assert polynomial(x) == pytest.approx(float(truth(x)), rel=1e-6)


def test_tea_fit_needs_enough_changes():
    with pytest.raises(ValueError, match="more than 4 changes"):
        fit_polynomial([(0.1, 0.2)])


def test_tea_changes_are_those_within_a_run(sampler):
    recorder, model = TeaRecorder(), sampler.transformer
    plain = sampler.run(6)
    with recorded(recorder, model, model):
        for _ in range(2):
            assert torch.equal(sampler.run(6), plain)
    assert len(recorder.changes) == 2 * 5
    assert recorder.changes[:5] == recorder.changes[5:]
    assert all(x > 0 and y > 0 for x, y in recorder.changes)


def test_tea_changes_are_those_within_a_branch():
    """Two calls a step: each output is compared with the same branch's of the step before."""
    case, recorder, outputs = CASES["flux-true-cfg"], TeaRecorder(), []
    pipe = case.build()
    model = pipe.transformer
    model.register_forward_hook(lambda _, args, output: outputs.append(output[0].clone()))
    with recorded(recorder, pipe, model):
        run(case, pipe)
    assert len(outputs) == 2 * case.steps
    expected = [
        float((now.double() - before.double()).abs().sum() / before.double().abs().sum())
        for before, now in zip(outputs, outputs[2:], strict=False)
    ]
    assert [y for _, y in recorder.changes] == pytest.approx(expected, rel=1e-4)


# -- Fast ----------------------------------------------------------------------------------------


def test_a_linear_map_is_recovered():
    generator = torch.Generator().manual_seed(0)
    weight, bias = 0.1 * torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)
    fit = LinearMapFit(6)
    x = torch.randn(4, 50, 6, generator=generator)
    fit.add(x, x + x @ weight.T + bias)
    found_weight, found_bias = fit.solve()
    torch.testing.assert_close(found_weight, weight, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(found_bias, bias, rtol=0.02, atol=2e-3)


def test_fast_maps_are_of_every_block_and_stream_and_the_stack(sampler):
    recorder, model = FastRecorder(), sampler.transformer
    with recorded(recorder, model, model):
        sampler.run(6)
    maps = recorder.maps()
    assert len(maps) == 2 * (2 * len(all_blocks(model)) + 1)
    assert maps["stack.hidden_states.weight"].shape == (32, 32)


def test_a_blocks_map_is_fitted_on_its_own_tokens(sampler):
    """What a block that is a linear map itself adds to its tokens is found again."""
    recorder, model = FastRecorder(), sampler.transformer
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(32, 32, generator=generator)
    block, seen = model.transformer_blocks[1], []

    def forward(hidden_states, encoder_hidden_states, **kwargs):
        seen.append(hidden_states[0])
        return encoder_hidden_states, hidden_states + hidden_states @ weight.T + 0.5

    block.forward = forward
    with recorded(recorder, model, model):
        sampler.run(10)
    maps, x = recorder.maps(), torch.cat(seen)
    expected = x @ weight.T + 0.5
    found = x @ maps["blocks.1.hidden_states.weight"].float().T
    found = found + maps["blocks.1.hidden_states.bias"].float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@each_unmasked
def test_maps_and_changes_are_recorded_of_every_family(tiny):
    sampler = FamilySampler(tiny)
    model, family = sampler.model, find_family(sampler.model)
    fast, tea = FastRecorder(), TeaRecorder()
    for recorder in (fast, tea):
        with recorded(recorder, model, model, scheduler=sampler.scheduler):
            sampler.run(STEPS)
    streams = {name for each in family.block_lists for name in each.streams}
    units = {f"blocks.{i}.{s}" for i in range(len(tiny.blocks(model))) for s in streams}
    assert set(fast.fits) == units | {f"stack.{family.output_stream}"}
    assert len(tea.changes) == STEPS - 1


# -- Ada -----------------------------------------------------------------------------------------


def test_ada_changes_are_those_of_uncached_runs(sampler):
    rule = PublishedRule(EVERY_STEP)
    expected = euler(sampler, flux_reference(sampler.transformer, rule), ADA_STEPS)
    with recorded_changes(sampler.transformer) as changes:
        for _ in range(2):
            x = sampler.run(ADA_STEPS)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert changes == pytest.approx(2 * rule.changes[:-1], rel=1e-4)
    assert not hasattr(sampler.transformer, "_cache_call_handler")


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5, 0.8])
def test_a_fitted_codebook_covers_shares_that_give_the_fraction(fraction):
    rates = (6, 5, 4, 3, 2, 1)
    shares = step_shares(fraction, rates)
    assert shares.sum() == pytest.approx(1.0)
    assert (shares / np.array(rates)).sum() == pytest.approx(fraction, abs=1e-6)
    changes = np.linspace(0.01, 0.4, 5000).tolist()
    codebook = fit_codebook(changes, fraction, rates)
    used = [codebook.rate(c) for c in changes]
    assert sum(1 / rate for rate in used) / len(used) == pytest.approx(fraction, rel=2e-3)


def test_a_codebooks_fit_says_what_it_needs():
    with pytest.raises(ValueError, match="compute_fraction must be between 0.250 and 0.500"):
        step_shares(0.6, (4, 3, 2))
    with pytest.raises(ValueError, match="needs at least 12 changes, got 3"):
        fit_codebook([0.1, 0.2, 0.3], 0.3, (4, 3, 2))
