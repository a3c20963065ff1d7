"""Models that are compiled, or wrapped for data parallelism, before or after a cache is enabled."""

import pytest
import torch
from torch import nn

from tests.pipelines import CASES, run
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import (
    AdaCorrection,
    Auto,
    Fb,
    cache_summary,
    disable_cache,
    enable_cache,
    is_cache_enabled,
)

STEPS = 12
LOOSE = Auto(tolerance=0.05)
FB = Fb(threshold=0.5)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, backend="eager")


def of_flux(method=LOOSE):
    """What the same run gives without any wrapper: the latents, and the computed steps."""
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, method, scheduler=sampler.scheduler)
    x = sampler.run(STEPS, finish=False)
    return x, cache_summary(sampler.transformer).computed_steps


def test_a_pipeline_whose_transformer_is_compiled_is_cached():
    case = CASES["flux"]
    pipe = case.build()
    plain = run(case, pipe)
    pipe.transformer = compiled(pipe.transformer)
    enable_cache(pipe, LOOSE)
    run(case, pipe)
    assert 0 < cache_summary(pipe).computed_steps < case.steps
    disable_cache(pipe)
    assert torch.equal(run(case, pipe), plain)


def test_a_model_may_be_compiled_after_its_cache_was_enabled():
    expected, computed = of_flux()
    model = make_tiny_flux()
    sampler = FluxSampler(model)
    enable_cache(model, LOOSE, scheduler=sampler.scheduler)
    sampler.transformer = compiled(model)
    assert is_cache_enabled(sampler.transformer)
    x = sampler.run(STEPS, finish=False)
    assert cache_summary(sampler.transformer).computed_steps == computed
    torch.testing.assert_close(x, expected)
    disable_cache(sampler.transformer)
    assert not is_cache_enabled(model) and not is_cache_enabled(sampler.transformer)


@pytest.mark.parametrize("method", ["Fb", "Fast", "Fb+AdaCorrection"])
def test_blocks_that_were_compiled_by_hand_are_cached(method):
    plain = make_tiny_flux()
    plain_sampler = FluxSampler(plain)
    enable_cache(plain, method, rel_l1_thresh=0.5, scheduler=plain_sampler.scheduler)
    expected = plain_sampler.run(STEPS, finish=False)
    model = make_tiny_flux()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = compiled(block)
    sampler = FluxSampler(model)
    enable_cache(model, method, rel_l1_thresh=0.5, scheduler=sampler.scheduler)
    torch.testing.assert_close(sampler.run(STEPS, finish=False), expected)
    assert cache_summary(model).compute_fraction < 0.9


@pytest.mark.parametrize("method", [FB, Fb(correction=AdaCorrection())], ids=["Fb", "corrected"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_block_method_on_a_model_compiled_as_a_whole_is_refused(method, in_place):
    model = make_tiny_flux()
    scheduler, whole = FluxSampler(model).scheduler, model
    if in_place:
        model.compile(backend="eager")
    else:
        whole = compiled(model)
    with pytest.raises(ValueError, match="acts on the blocks.*compile_repeated_blocks.*or use Aut"):
        enable_cache(whole, method, scheduler=scheduler)
    assert not is_cache_enabled(model)


@pytest.mark.parametrize("method", [LOOSE, FB], ids=["Auto", "Fb"])
@pytest.mark.parametrize("outside", [True, False], ids=["on the wrapper", "on the model"])
def test_data_parallel_wrappers_are_looked_through(method, outside):
    expected, computed = of_flux(method)
    model = make_tiny_flux()
    wrapper = nn.DataParallel(model)
    sampler = FluxSampler(model)
    enable_cache(wrapper if outside else model, method, scheduler=sampler.scheduler)
    sampler.call = lambda x, t, branch="cond": wrapper(
        **sampler.inputs(x, t, branch), return_dict=False
    )[0]
    assert torch.equal(sampler.run(STEPS, finish=False), expected)
    assert cache_summary(wrapper).computed_steps == computed
    with pytest.raises(ValueError, match="already enabled"):
        enable_cache(wrapper, method, scheduler=sampler.scheduler)
    disable_cache(wrapper)
    assert not is_cache_enabled(model) and not is_cache_enabled(wrapper)
