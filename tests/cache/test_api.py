"""The verbs, on pipelines and models, and the entry point that xfuser's callers know."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)

from xfuser_adacorr import (
    Ada,
    apply_cache_on_transformer,
    cache_summary,
    disable_cache,
    enable_cache,
    is_cache_enabled,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.api import site_of


def test_enabling_twice_raises(transformer):
    enable_cache(transformer, "Auto")
    with pytest.raises(ValueError, match="already enabled"):
        enable_cache(transformer, "Fb")
    with pytest.raises(ValueError, match="already been enabled"):
        transformer.enable_cache(FirstBlockCacheConfig())


def test_enabling_over_a_diffusers_cache_raises(transformer):
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="already enabled"):
        enable_cache(transformer, "Fb")


@pytest.mark.parametrize("method", ["Auto", "Fb"])
@pytest.mark.parametrize("bare", [False, True])
def test_the_models_own_verbs_work(sampler, method, bare):
    transformer = sampler.transformer
    assert not is_cache_enabled(transformer)
    enable_cache(transformer, method, scheduler=None if bare else sampler.scheduler)
    assert is_cache_enabled(transformer) and transformer.is_cache_enabled
    transformer.disable_cache()
    assert not is_cache_enabled(transformer)


def test_verbs_on_a_plain_model_say_what_to_do(transformer):
    for verb in (disable_cache, reset_cache, cache_summary):
        with pytest.raises(ValueError, match="enable_cache first"):
            verb(transformer)


def test_a_summary_before_any_call_is_empty(sampler):
    enable_cache(sampler.transformer, "Auto", scheduler=sampler.scheduler)
    summary = cache_summary(sampler.transformer)
    assert (summary.method, summary.num_steps, summary.compute_fraction) == ("Auto", 0, 1.0)


def flux_pipeline(transformer):
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(latent_channels=2, block_out_channels=(32,)),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return pipe(
        prompt_embeds=torch.ones(1, 6, 16),
        pooled_prompt_embeds=torch.ones(1, 16),
        height=8,
        width=8,
        num_inference_steps=11,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


@pytest.mark.parametrize("method", ["Auto", "Tea", "Tea+AdaCorrection"])
def test_a_pipeline_tells_steps_and_scheduler(transformer, method):
    pipe = flux_pipeline(transformer)
    options = {} if method == "Auto" else {"rel_l1_thresh": 0.3}
    plain = draw(pipe)
    enable_cache(pipe, method, **options)
    assert is_cache_enabled(pipe) and is_cache_enabled(transformer)
    x = draw(pipe)
    summary = cache_summary(pipe)
    assert x.shape == plain.shape and not torch.equal(x, plain)
    assert summary.num_steps == 11 and summary.reused_steps > 0
    assert not site_of(transformer).tracker.latest.tracks
    disable_cache(pipe)
    assert torch.equal(draw(pipe), plain)


def test_a_scheduler_may_be_changed_while_enabled(transformer):
    """Pipelines are given other schedulers after they were made: the new one is taken over."""
    pipe = enable_cache(flux_pipeline(transformer), "Auto")
    first = pipe.scheduler
    draw(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    x = draw(pipe)
    assert cache_summary(pipe).reused_steps > 0
    assert type(first) is FlowMatchEulerDiscreteScheduler
    again = flux_pipeline(transformer)
    again.scheduler = pipe.scheduler
    disable_cache(pipe)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(draw(enable_cache(again, "Auto")), x)


def test_xfuser_callers_arguments_work(transformer):
    same = apply_cache_on_transformer(
        transformer,
        use_cache="Fast",
        rel_l1_thresh=0.1,
        return_hidden_states_first=False,
        num_steps=8,
        enable_adacorrection=True,
        adacorr_gamma=1.0,
        adacorr_lambda=1.0,
    )
    assert same is transformer and is_cache_enabled(transformer)


def test_the_entry_point_takes_adas_options(transformer):
    apply_cache_on_transformer(transformer, use_cache="Ada", codebook={0.1: 4, 0.5: 1}, num_steps=9)
    method = site_of(transformer).method
    assert method == Ada(codebook=((0.1, 4), (0.5, 1)), num_steps=9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_cache": "Ada", "codebook": "medium"}, "codebook must be one of fast, slow"),
        ({"use_cache": "Ada", "moreg_divisor": 0}, "moreg_divisor must be .*above 0"),
        ({"use_cache": "Ada", "moreg_divisor": 1.2}, "moreg_divisor is for moreg=True"),
        ({"use_cache": "Ada", "moreg": True}, "moreg must be False for FluxTransformer2DModel"),
        ({"use_cache": "Fb", "moreg": True}, "moreg is an option of Ada, not of Fb"),
        ({"use_cache": "Fb", "motion_threshold": 0.3}, "motion_threshold is an option of Fast, no"),
        ({"use_cache": "Fb", "adacorr_gamma": 2.0}, "adacorr_gamma is an option of .*not of Fb"),
    ],
)
def test_the_entry_point_refuses_options_as_enable_cache_does(transformer, options, named):
    with pytest.raises(ValueError, match=named):
        apply_cache_on_transformer(transformer, **options)
    assert not is_cache_enabled(transformer)


def test_no_method_and_no_correction_leaves_the_model_alone(transformer):
    apply_cache_on_transformer(transformer, use_cache=None)
    assert not is_cache_enabled(transformer)


def test_correction_alone_is_auto(transformer):
    apply_cache_on_transformer(transformer, use_cache=None, enable_adacorrection=True)
    assert site_of(transformer).method.name == "Auto"


def test_entry_point_is_importable_where_xfusers_callers_look():
    from xfuser_adacorr.model_executor.cache import diffusers_adapters
    from xfuser_adacorr.model_executor.cache.diffusers_adapters import flux

    assert diffusers_adapters.apply_cache_on_transformer is apply_cache_on_transformer
    assert flux.apply_cache_on_transformer is apply_cache_on_transformer
