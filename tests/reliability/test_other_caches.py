"""Two caches on one model would answer each other's calls: the second is refused."""

import pytest
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    apply_faster_cache,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import disable_cache, enable_cache, is_cache_enabled

HOOKS = {
    "first block": lambda model: apply_first_block_cache(model, FirstBlockCacheConfig()),
    "pyramid": lambda model: apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "taylorseer": lambda model: apply_taylorseer_cache(model, TaylorSeerCacheConfig()),
    "faster": lambda model: apply_faster_cache(
        model,
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
            is_guidance_distilled=True,
        ),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "scheduler"])
def test_hooks_of_a_cache_of_diffusers_are_refused(name, bare):
    model = make_tiny_flux()
    HOOKS[name](model)
    assert is_cache_enabled(model)
    with pytest.raises(ValueError, match="a cache of diffusers .* is already enabled on the"):
        enable_cache(model, "Auto", scheduler=None if bare else FluxSampler(model).scheduler)


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "scheduler"])
def test_hooks_that_come_after_ours_are_refused_in_the_next_run(bare):
    model = make_tiny_flux()
    sampler = FluxSampler(model)
    enable_cache(model, "Auto", scheduler=None if bare else sampler.scheduler)
    sampler.run(4)
    HOOKS["first block"](model)
    with pytest.raises(ValueError, match=r"a cache of diffusers \(fbc_.*disable one of them"):
        sampler.run(4)
    disable_cache(model)
    assert is_cache_enabled(model), "diffusers' is still there"


def test_other_hooks_of_diffusers_are_no_caches():
    model = make_tiny_flux()
    HookRegistry.check_if_exists_or_initialize(model)
    model.enable_layerwise_casting()
    assert not is_cache_enabled(model)
    enable_cache(model, "Auto", scheduler=FluxSampler(model).scheduler)
    assert is_cache_enabled(model)
