"""Installing, state, and everything that must never leave a stale cache behind."""

import copy
import gc
from itertools import groupby

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline

from tests.tiny import FluxSampler, all_blocks, make_tiny_flux
from xfuser_adacorr import (
    CacheConfig,
    apply_cache_on_transformer,
    cache_summary,
    disable_cache,
    enable_cache,
    is_cache_enabled,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.context import tensor_bytes
from xfuser_adacorr.model_executor.cache.engine import engine_of

STEPS = 16
CONFIGS = [
    CacheConfig(use_cache="Fb", rel_l1_thresh=0.5),
    CacheConfig(use_cache="Tea", rel_l1_thresh=0.15),
    CacheConfig(use_cache="Fast", rel_l1_thresh=0.08),
    CacheConfig(use_cache="Auto", adacorr_tolerance=0.02),
    CacheConfig(use_cache="Fb", rel_l1_thresh=0.5, enable_adacorrection=True),
    CacheConfig(use_cache="Tea", rel_l1_thresh=0.15, enable_adacorrection=True),
    CacheConfig(use_cache="Fast", rel_l1_thresh=0.08, enable_adacorrection=True),
    CacheConfig(use_cache="Fast", enable_adacorrection=True, adacorr_mode="literal"),
    CacheConfig(use_cache="Ada", codebook={0.1: 3, 9.0: 2}),
    CacheConfig(use_cache="Ada", codebook={0.1: 3, 9.0: 2}, enable_adacorrection=True),
    CacheConfig(
        use_cache="Ada",
        codebook={0.1: 3, 9.0: 2},
        enable_adacorrection=True,
        adacorr_mode="literal",
    ),
]
each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=[f"{c.name}-{c.adacorr_mode}" for c in CONFIGS]
)


def cached_run(config, **kwargs):
    """The result of a fresh model that knows no earlier run."""
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    return sampler.run(**{"steps": STEPS, **kwargs})


@each_config
def test_disabling_restores_the_model_bit_for_bit(sampler, config):
    model = sampler.transformer
    plain, before = sampler.run(STEPS), dict(model.__dict__)
    block_before = dict(all_blocks(model)[0].__dict__)
    state = copy.deepcopy(model.state_dict())
    enable_cache(model, config, scheduler=sampler.scheduler)
    assert not torch.equal(sampler.run(STEPS), plain)
    assert list(model.state_dict()) == list(state)
    disable_cache(model)
    assert model.__dict__.keys() == before.keys()
    assert all_blocks(model)[0].__dict__.keys() == block_before.keys()
    assert type(model) is type(make_tiny_flux())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(sampler.run(STEPS), plain)


def test_disabling_frees_the_engine(sampler):
    enable_cache(sampler.transformer, "Auto", scheduler=sampler.scheduler)
    sampler.run(4)
    disable_cache(sampler.transformer)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "CacheEngine"]


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


def test_the_models_own_verbs_work(transformer):
    assert not is_cache_enabled(transformer)
    enable_cache(transformer, "Auto")
    assert is_cache_enabled(transformer) and transformer.is_cache_enabled
    transformer.disable_cache()
    assert not is_cache_enabled(transformer)


def test_verbs_on_a_plain_model_say_what_to_do(transformer):
    for verb in (disable_cache, reset_cache, cache_summary):
        with pytest.raises(ValueError, match="enable_cache first"):
            verb(transformer)


@each_config
def test_second_generation_equals_the_first(sampler, config):
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    first = sampler.run(STEPS)
    assert torch.equal(sampler.run(STEPS), first)


@each_config
@pytest.mark.parametrize("bare", [False, True])
def test_cancelled_run_leaves_nothing_behind(config, bare):
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    expected = sampler.run(STEPS, seed=1)
    for stop_after in (1, 5):
        sampler.run(STEPS, seed=2, stop_after=stop_after)
        assert torch.equal(sampler.run(STEPS, seed=1), expected)


@each_config
def test_run_without_an_end_signal_is_followed_by_a_clean_one(config):
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    sampler.run(STEPS, seed=2, finish=False)
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, seed=1))


@each_config
def test_exception_leaves_nothing_behind(config):
    sampler = FluxSampler(make_tiny_flux())
    model = sampler.transformer
    enable_cache(model, config, scheduler=sampler.scheduler)
    handle = all_blocks(model)[3].register_forward_hook(lambda *a: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        sampler.run(STEPS)
    handle.remove()
    assert engine_of(model).generation is None
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, seed=1))


@each_config
def test_change_of_shape_or_batch_begins_anew(config):
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    sampler.run(STEPS, finish=False, stop_after=6)
    for kwargs in ({"grid": 5}, {"batch": 2}):
        x = sampler.run(STEPS, finish=False, **kwargs)
        assert torch.equal(x, cached_run(config, **kwargs))


def test_bare_transformer_with_counted_steps_wraps(sampler):
    config = CacheConfig(use_cache="Tea", rel_l1_thresh=0.15, num_steps=STEPS)
    enable_cache(sampler.transformer, config)
    first = sampler.run(STEPS, finish=False)
    assert torch.equal(sampler.run(STEPS, finish=False), first)


def test_change_of_the_step_count_needs_nothing(sampler):
    enable_cache(sampler.transformer, CONFIGS[1], scheduler=sampler.scheduler)
    for steps in (8, 12):
        sampler.run(steps)
        summary = cache_summary(sampler.transformer)
        assert summary.num_steps == steps
        assert summary.trace.calls[-1].reason == "last"


@each_config
def test_branches_are_kept_apart(config):
    """True CFG at scale 1 must give the conditional result, whatever uncond caches."""
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    guided = sampler.run(STEPS, guidance=1.0)
    contexts = {call.context for call in cache_summary(sampler.transformer).trace.calls}
    assert contexts == {"cond", "uncond"}
    torch.testing.assert_close(guided, cached_run(config), rtol=1e-4, atol=1e-4)


def test_uncond_that_joins_late_starts_with_a_refresh(sampler):
    enable_cache(sampler.transformer, "Auto", scheduler=sampler.scheduler)
    x = sampler.noise()
    sampler.scheduler.set_timesteps(STEPS)
    for i, t in enumerate(sampler.scheduler.timesteps):
        v = sampler.call(x, t)
        if i >= 5:
            sampler.call(x, t, "uncond")
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    joined = [c for c in cache_summary(sampler.transformer).trace.calls if c.context == "uncond"]
    assert (joined[0].step_index, joined[0].reason) == (5, "first")


def test_end_of_the_run_frees_all_tensors(sampler):
    enable_cache(sampler.transformer, CONFIGS[2], scheduler=sampler.scheduler)
    sampler.run(STEPS)
    engine = engine_of(sampler.transformer)
    assert engine.generation is None and not engine.finished.branches
    assert cache_summary(sampler.transformer).cache_memory_bytes > 0


TOKENS, WIDTH, LATENT, TEXT, BLOCKS = 16, 32, 8, 6, 5
STATED_FLOATS = {
    "Fb": 2 * TOKENS * WIDTH,
    "Tea": 2 * TOKENS * WIDTH,
    "Fast": BLOCKS * (2 * TOKENS + TEXT) * WIDTH,
    "Ada": 2 * TOKENS * WIDTH + 2,
    "Auto": 3 * TOKENS * LATENT,
    "Fb+AdaCorrection": TOKENS * WIDTH + 3 * TOKENS * LATENT,
    "Tea+AdaCorrection": TOKENS * WIDTH + 3 * TOKENS * LATENT,
    "Fast+AdaCorrection": TOKENS * WIDTH + 3 * TOKENS * LATENT,
    "Ada+AdaCorrection": TOKENS * WIDTH + 2 + 3 * TOKENS * LATENT,
}
SCALARS = 5
"""A refresh leaves four scalars to be read with the next decision, and the damping of the line."""


def longest_gap(engine):
    """Most reused calls in a row; each leaves the two weights of its forecast to be paid for."""
    outcomes = [call.refreshed for call in engine.summary().trace.calls]
    gaps = [len(list(run)) for refreshed, run in groupby(outcomes) if not refreshed]
    return max(gaps, default=0)


@pytest.mark.parametrize("name", STATED_FLOATS)
def test_no_method_holds_more_than_its_stated_memory(sampler, name):
    """The stated memory of the docs; the tensors alive in the engine are counted every call."""
    options = {} if name == "Auto" else {"rel_l1_thresh": 0.3}
    config = CacheConfig.from_name(name, **options)
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    engine, held = engine_of(sampler.transformer), []
    finish = engine._finish

    def counting(*args):
        out = finish(*args)
        held.append(
            tensor_bytes(
                [[b.method_state, b.correction_state] for b in engine.generation.branches.values()]
            )
        )
        return out

    engine._finish = counting
    sampler.run(STEPS)
    scalars = SCALARS + 2 * longest_gap(engine) if config.enable_adacorrection else 0
    assert 0 <= max(held) - 4 * STATED_FLOATS[name] <= 4 * scalars
    stated = 4 * (STATED_FLOATS[name] + (SCALARS if config.enable_adacorrection else 0))
    assert cache_summary(sampler.transformer).cache_memory_bytes == stated


def test_forward_hooks_of_others_keep_working(sampler):
    seen = []
    model = sampler.transformer
    model.register_forward_hook(lambda *args: seen.append("model"))
    all_blocks(model)[1].register_forward_hook(lambda *args: seen.append("block"))
    enable_cache(model, CacheConfig(use_cache="Fb", rel_l1_thresh=0.0))
    sampler.run(3)
    assert seen.count("block") == 3 and seen.count("model") == 3


def test_lora_added_before_or_after_enabling_takes_effect(sampler):
    peft = pytest.importorskip("peft")
    model = sampler.transformer
    lora = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    plain = sampler.run(4)
    enable_cache(model, CacheConfig(use_cache="Fb", rel_l1_thresh=0.0))
    torch.manual_seed(0)
    model.add_adapter(lora)
    after = sampler.run(4)
    disable_cache(model)
    assert torch.equal(sampler.run(4), after)
    assert not torch.equal(after, plain)


@pytest.mark.parametrize("name", ["Fb", "Tea", "Fast", "Ada", "Auto"])
def test_controlnet_residuals_reach_a_reused_call_unharmed(sampler, name):
    """A hit must not add ControlNet's residuals on top of a residual that contains them."""
    extra = {"controlnet_block_samples": [torch.full((1, 16, 32), 0.5)] * 2}
    plain = sampler.run(STEPS, extra=extra)
    options = {} if name == "Auto" else {"rel_l1_thresh": 0.15}
    enable_cache(sampler.transformer, name, scheduler=sampler.scheduler, **options)
    x = sampler.run(STEPS, extra=extra)
    assert (x - plain).norm() / plain.norm() < 0.1


def test_accelerate_offload_hooks_do_not_switch_the_cache_off(sampler):
    """Pipelines remove and add offload hooks after every run, which replaces ``forward``."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = sampler.transformer
    add_hook_to_module(model, ModelHook())
    enable_cache(model, CONFIGS[3], scheduler=sampler.scheduler)
    sampler.run(STEPS)
    remove_hook_from_module(model, recurse=True)
    add_hook_to_module(model, ModelHook())
    sampler.run(STEPS)
    assert cache_summary(model).reused_steps > 0


def test_compiled_blocks_stay_one_graph(sampler):
    """Decisions sit outside the blocks' graphs: compiling them in full must not break."""
    torch._dynamo.reset()
    for block in all_blocks(sampler.transformer):
        block.compile(fullgraph=True, backend="eager")
    plain = sampler.run(STEPS)
    enable_cache(sampler.transformer, CONFIGS[1], scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    assert cache_summary(sampler.transformer).reused_steps > 0
    assert (x - plain).norm() / plain.norm() < 0.1


def test_auto_caches_a_transformer_compiled_as_a_whole(sampler):
    torch._dynamo.reset()
    sampler.transformer.compile(backend="eager")
    plain = sampler.run(STEPS)
    enable_cache(sampler.transformer, CONFIGS[3], scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    assert cache_summary(sampler.transformer).reused_steps > 0
    assert (x - plain).norm() / plain.norm() < 0.1


def test_blocks_called_outside_the_transformer_are_plain(sampler):
    from tests.tiny import embed

    model = sampler.transformer
    hidden, encoder, shared = embed(model, sampler.inputs(sampler.noise(), 500.0))
    expected = all_blocks(model)[0](hidden, encoder, **shared)
    enable_cache(model, "Fb")
    out = all_blocks(model)[0](hidden, encoder, **shared)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_pipeline_tells_steps_and_scheduler(transformer):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

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
    enable_cache(pipe, "Auto")
    out = pipe(
        prompt_embeds=torch.randn(1, 6, 16),
        pooled_prompt_embeds=torch.randn(1, 16),
        height=8,
        width=8,
        num_inference_steps=11,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    summary = cache_summary(pipe)
    assert out.images.shape[0] == 1
    assert summary.num_steps == 11 and summary.reused_steps > 0
    assert not engine_of(transformer).finished.branches
    disable_cache(pipe)


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
    apply_cache_on_transformer(
        transformer, use_cache="Ada", codebook={0.1: 4, 0.5: 1}, moreg_divisor=1.2
    )
    config = engine_of(transformer).config
    assert config.codebook == ((0.1, 4), (0.5, 1))
    assert (config.moreg, config.moreg_divisor) == (False, 1.2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_cache": "Ada", "codebook": "medium"}, "codebook must be one of fast, slow"),
        ({"use_cache": "Ada", "moreg_divisor": 0}, "moreg_divisor must be above 0"),
        ({"use_cache": "Ada", "moreg": True}, "moreg must be False for FluxTransformer2DModel"),
        ({"use_cache": "Fb", "moreg": True}, "moreg is an option of Ada, not of Fb"),
    ],
)
def test_the_entry_point_refuses_adas_options_as_enable_cache_does(transformer, options, named):
    with pytest.raises(ValueError, match=named):
        apply_cache_on_transformer(transformer, **options)
    assert not is_cache_enabled(transformer)


def test_no_method_and_no_correction_leaves_the_model_alone(transformer):
    apply_cache_on_transformer(transformer, use_cache=None)
    assert not is_cache_enabled(transformer)


def test_correction_alone_is_auto(transformer):
    apply_cache_on_transformer(transformer, use_cache=None, enable_adacorrection=True)
    assert engine_of(transformer).config.use_cache == "Auto"


def test_entry_point_is_importable_where_xfusers_callers_look():
    from xfuser_adacorr.model_executor.cache import diffusers_adapters
    from xfuser_adacorr.model_executor.cache.diffusers_adapters import flux

    assert diffusers_adapters.apply_cache_on_transformer is apply_cache_on_transformer
    assert flux.apply_cache_on_transformer is apply_cache_on_transformer
