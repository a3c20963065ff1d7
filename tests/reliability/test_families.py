"""Descriptions that do not fit a model, and pipelines that lack something, are refused by name."""

from dataclasses import replace

import pytest

from tests.pipelines import CASES
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import enable_cache, is_cache_enabled
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
    BlockList,
    find_family,
    register_family,
)

ONE = ("hidden_states",)


@pytest.mark.parametrize("meaning", ["latents", "timestep"])
@pytest.mark.parametrize("method", ["Auto", "Fb"])
def test_an_argument_that_forward_lacks_is_refused_when_enabled(own_registry, meaning, method):
    model = make_tiny_flux()
    register_family(replace(find_family(model), **{meaning: "x"}))
    words = f"{meaning} of family 'flux' must be an argument .* got 'x'; accepted: hidden_states"
    with pytest.raises(ValueError, match=words):
        enable_cache(model, method)
    assert not is_cache_enabled(model)


def test_lists_of_blocks_that_the_model_lacks_are_refused_when_enabled(own_registry):
    model = make_tiny_flux()
    made_up = (BlockList(attribute="my_blocks", streams=ONE, returns=ONE),)
    register_family(replace(find_family(model), block_lists=made_up))
    with pytest.raises(ValueError, match="which has no blocks in 'my_blocks'"):
        enable_cache(model, "Fb", rel_l1_thresh=0.1)
    enable_cache(model, "Auto")  # needs no blocks


def test_returns_that_the_blocks_do_not_have_are_refused_in_the_first_call(own_registry):
    model = make_tiny_flux()
    made_up = (BlockList(attribute="transformer_blocks", streams=ONE, returns=ONE),)
    register_family(replace(find_family(model), block_lists=made_up))
    enable_cache(model, "Fb", rel_l1_thresh=0.1)
    with pytest.raises(ValueError, match="transformer_blocks: returns must name .* for 2 values"):
        FluxSampler(model).run(4)


def test_a_pipeline_without_a_scheduler_is_refused():
    pipe = CASES["flux"].build()
    pipe.scheduler = None
    with pytest.raises(ValueError, match="FluxPipeline has no scheduler with step"):
        enable_cache(pipe)
    assert not is_cache_enabled(pipe)
