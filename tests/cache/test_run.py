"""Installing, state, and everything that must never leave a stale cache behind."""

import copy
import gc
from collections.abc import Mapping
from functools import wraps

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.cached import computed, run_cached
from tests.tiny import FluxSampler, all_blocks, embed, make_tiny_flux
from xfuser_adacorr import (
    AdaCorrection,
    CacheConfig,
    Literal,
    Schedule,
    cache_summary,
    disable_cache,
    enable_cache,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.api import site_of

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


def is_literal(config):
    return isinstance(getattr(config, "correction", None), Literal)


def name_of(config):
    return config.name + (" literal" if is_literal(config) else "")


each_config = pytest.mark.parametrize("config", CONFIGS, ids=name_of)
bare_or_not = pytest.mark.parametrize("bare", [False, True], ids=["scheduler", "bare"])
EVERYWHERE = [(config, False) for config in CONFIGS]
EVERYWHERE += [(CONFIGS[i], True) for i in (0, 3, 4, 7)]
each_config_everywhere = pytest.mark.parametrize(
    ("config", "bare"), EVERYWHERE, ids=[name_of(c) + (" bare" if b else "") for c, b in EVERYWHERE]
)


def enabled(config, bare=False):
    """A sampler with a fresh model under a cache."""
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    return sampler


def cached_run(config, bare=False, **kwargs):
    """The result of a fresh model that knows no earlier run."""
    return enabled(config, bare).run(**{"steps": STEPS, **kwargs})


def current_run(sampler):
    site = site_of(sampler.transformer)
    return site.tracker.run if hasattr(site, "tracker") else site.run


# -- taking over and giving back -------------------------------------------------------------------


@each_config_everywhere
def test_disabling_restores_the_model_bit_for_bit(sampler, config, bare):
    model, scheduler = sampler.transformer, sampler.scheduler
    plain, before = sampler.run(STEPS), dict(model.__dict__)
    block_before = dict(all_blocks(model)[0].__dict__)
    stepper, attributes = type(scheduler), set(vars(scheduler))
    state = copy.deepcopy(model.state_dict())
    enable_cache(model, config, scheduler=None if bare else scheduler)
    assert not torch.equal(sampler.run(STEPS), plain)
    assert list(model.state_dict()) == list(state)
    disable_cache(model)
    assert model.__dict__.keys() == before.keys()
    assert all_blocks(model)[0].__dict__.keys() == block_before.keys()
    assert type(model) is type(make_tiny_flux())
    assert type(scheduler) is stepper and set(vars(scheduler)) == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(sampler.run(STEPS), plain)


SITES = {"SamplerSite", "StackSite", "ModelSite", "RunTracker", "Run", "ModelRun"}
STATES = {"Lane", "ErrorRule", "DampedLine", "StackRule", "Branch"}


def alive():
    """How many sites and states there are, of whatever was enabled in this process."""
    gc.collect()
    return sum(type(x).__name__ in SITES | STATES for x in gc.get_objects())


@each_config_everywhere
def test_disabling_frees_everything(sampler, config, bare):
    before = alive()
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    sampler.run(6, finish=False, stop_after=4)
    assert alive() > before
    disable_cache(sampler.transformer)
    assert alive() == before


def test_blocks_called_outside_the_transformer_are_plain(sampler):
    model = sampler.transformer
    hidden, encoder, shared = embed(model, sampler.inputs(sampler.noise(), 500.0))
    expected = all_blocks(model)[0](hidden, encoder, **shared)
    enable_cache(model, "Fb")
    out = all_blocks(model)[0](hidden, encoder, **shared)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# -- one run after another -------------------------------------------------------------------------


@each_config_everywhere
def test_second_run_equals_the_first(config, bare):
    sampler = enabled(config, bare)
    first = sampler.run(STEPS)
    assert torch.equal(sampler.run(STEPS), first)


@each_config_everywhere
def test_cancelled_run_leaves_nothing_behind(config, bare):
    sampler = enabled(config, bare)
    expected = sampler.run(STEPS, seed=1)
    for stop_after in (1, 5):
        sampler.run(STEPS, seed=2, stop_after=stop_after)
        assert torch.equal(sampler.run(STEPS, seed=1), expected)


@each_config
def test_run_without_an_end_signal_is_followed_by_a_clean_one(config):
    sampler = enabled(config)
    sampler.run(STEPS, seed=2, finish=False)
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, seed=1))


@each_config_everywhere
def test_exception_leaves_nothing_behind(config, bare):
    sampler = enabled(config, bare)
    handle = all_blocks(sampler.transformer)[3].register_forward_hook(
        lambda *a: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        sampler.run(STEPS)
    handle.remove()
    assert current_run(sampler) is None
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, bare, seed=1))


@each_config
def test_exception_in_the_scheduler_leaves_nothing_behind(config, monkeypatch):
    sampler = enabled(config)
    index_for_timestep = type(sampler.scheduler).index_for_timestep
    monkeypatch.setattr(type(sampler.scheduler), "_init_step_index", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.run(STEPS)
    monkeypatch.undo()
    assert current_run(sampler) is None
    assert type(sampler.scheduler).index_for_timestep is index_for_timestep
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, seed=1))


@each_config_everywhere
def test_change_of_shape_or_batch_begins_anew(config, bare):
    sampler = enabled(config, bare)
    sampler.run(STEPS, finish=False, stop_after=6)
    for kwargs in ({"grid": 5}, {"batch": 2}):
        x = sampler.run(STEPS, finish=False, **kwargs)
        assert torch.equal(x, cached_run(config, bare, **kwargs))


@each_config
def test_latents_of_another_shape_within_a_run_are_computed(config):
    """Without ``set_timesteps`` in between, as a callback may crop the latents."""
    sampler = enabled(config)
    sampler.scheduler.set_timesteps(STEPS)
    x = sampler.noise(grid=5)
    for i, t in enumerate(sampler.scheduler.timesteps):
        if i == 8:
            x = x[:, :16]
        v = sampler.call(x, t)
        assert v.shape == x.shape
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    calls = cache_summary(sampler.transformer).trace.calls
    assert calls[8].refreshed and len(calls) == STEPS and x.isfinite().all()


def test_bare_transformer_with_counted_steps_wraps(sampler):
    config = CacheConfig(use_cache="Tea", rel_l1_thresh=0.15, num_steps=STEPS)
    enable_cache(sampler.transformer, config)
    first = sampler.run(STEPS, finish=False)
    assert torch.equal(sampler.run(STEPS, finish=False), first)


def test_change_of_the_step_count_needs_nothing():
    sampler = enabled(CONFIGS[1])
    for steps in (8, 12):
        sampler.run(steps)
        summary = cache_summary(sampler.transformer)
        assert summary.num_steps == steps
        assert summary.trace.calls[-1].reason == "last"


@each_config
def test_reset_in_the_middle_begins_anew(config):
    sampler = enabled(config)
    sampler.run(STEPS, stop_after=6, finish=False)
    reset_cache(sampler.transformer)
    assert current_run(sampler) is None
    assert cache_summary(sampler.transformer).num_steps == 6
    assert torch.equal(sampler.run(STEPS, seed=1), cached_run(config, seed=1))


def test_calls_outside_of_a_run_are_plain(sampler):
    """Before ``set_timesteps``, and after the last step: a pipeline may refine with the model."""
    x = sampler.noise()
    plain = sampler.call(x, 500.0)
    enable_cache(sampler.transformer, CONFIGS[3], scheduler=sampler.scheduler)
    sampler.run(STEPS, finish=False)
    calls = len(cache_summary(sampler.transformer).trace.calls)
    for _ in range(3):
        assert torch.equal(sampler.call(x, 500.0), plain)
    assert len(cache_summary(sampler.transformer).trace.calls) == calls == STEPS


def test_the_end_of_a_run_frees_all_tensors():
    for config in CONFIGS:
        sampler = enabled(config)
        sampler.run(STEPS, finish=False)
        assert not tensors_held(site_of(sampler.transformer))
        assert cache_summary(sampler.transformer).cache_memory_bytes > 0


# -- branches --------------------------------------------------------------------------------------


@each_config_everywhere
def test_branches_are_kept_apart(config, bare):
    """True CFG at scale 1 must give the conditional result, whatever uncond caches."""
    sampler = enabled(config, bare)
    guided = sampler.run(STEPS, guidance=1.0)
    summary = cache_summary(sampler.transformer)
    of_steps = config.answers_steps and not bare
    contexts = {"step"} if of_steps else {"cond", "uncond"}
    assert {call.context for call in summary.trace.calls} == contexts
    assert summary.calls == 2 * STEPS and summary.num_steps == STEPS
    torch.testing.assert_close(guided, cached_run(config, bare), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=["Fb", "Auto"])
def test_branches_without_a_context_are_told_apart_by_their_order(config):
    """Calls of a bare model at one timestep: the first is another branch than the second."""
    named, unnamed = enabled(config, bare=True), enabled(config, bare=True)
    unnamed.call = lambda x, t, branch="cond": unnamed.transformer(
        **unnamed.inputs(x, t, branch), return_dict=False
    )[0]
    assert torch.equal(named.run(STEPS, guidance=3.0), unnamed.run(STEPS, guidance=3.0))
    assert cache_summary(unnamed.transformer).reused_steps > 0


def late_guidance(sampler, first):
    """Guidance by a branch that is called from step ``first`` on."""
    x = sampler.noise()
    sampler.scheduler.set_timesteps(STEPS)
    for i, t in enumerate(sampler.scheduler.timesteps):
        v = sampler.call(x, t)
        if i >= first:
            uncond = sampler.call(x, t, "uncond")
            v = uncond + 2.0 * (v - uncond)
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    return x


def test_a_branch_that_joins_late_starts_with_a_refresh():
    sampler = enabled(CONFIGS[0])
    late_guidance(sampler, first=5)
    calls = cache_summary(sampler.transformer).trace.calls
    joined = [c for c in calls if c.context == "uncond"]
    assert (joined[0].step_index, joined[0].reason) == (5, "first")


@pytest.mark.parametrize("listed", [[0, 1, 2], [0, 1, 5]])
@pytest.mark.parametrize("options", [{"forecast": "line"}, {"correction": AdaCorrection()}])
def test_guidance_that_begins_late_is_computed_soon(listed, options):
    """The guided output is another one then: a line through earlier ones does not hold."""
    sampler = enabled(Schedule(steps=listed, **options))
    late_guidance(sampler, first=5)
    calls = cache_summary(sampler.transformer).trace.calls
    if 5 in listed:
        assert computed(cache_summary(sampler.transformer)) == listed
    else:
        assert computed(cache_summary(sampler.transformer)) == [*listed, 6]
        assert calls[6].reason == "inputs"


def test_nothing_is_repaired_across_a_change_of_guidance(monkeypatch):
    """Steps 2 to 4 were skipped without guidance: the guided output at 5 is the sampler's own."""
    given, step = [], FlowMatchEulerDiscreteScheduler.step

    @wraps(step)
    def noting(self, **arguments):
        given.append(arguments["model_output"])
        return step(self, **arguments)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", noting)
    sampler = enabled(Schedule(steps=[0, 1, 5], correction=AdaCorrection()))
    called, call = [], sampler.call
    sampler.call = lambda *args: called.append(call(*args)) or called[-1]
    late_guidance(sampler, first=5)
    cond, uncond = called[5:7]
    assert torch.equal(given[5], uncond + 2.0 * (cond - uncond))


# -- memory ----------------------------------------------------------------------------------------

TOKENS, WIDTH, LATENT, TEXT, BLOCKS = 16, 32, 8, 6, 5
STATED_FLOATS = {
    "Fb": 2 * TOKENS * WIDTH,
    "Tea": 2 * TOKENS * WIDTH,
    "Fast": BLOCKS * (2 * TOKENS + TEXT) * WIDTH,
    "Ada": 2 * TOKENS * WIDTH + 2,
    "Auto": 4 * TOKENS * LATENT,
    "Fb+AdaCorrection": TOKENS * WIDTH + 4 * TOKENS * LATENT,
    "Tea+AdaCorrection": TOKENS * WIDTH + 4 * TOKENS * LATENT,
    "Fast+AdaCorrection": TOKENS * WIDTH + 4 * TOKENS * LATENT,
    "Ada+AdaCorrection": TOKENS * WIDTH + 2 + 4 * TOKENS * LATENT,
}
"""Correction keeps two outputs, the last refresh's latents, and what the model's call returned."""
SCALARS = 4
"""A refresh leaves three to be read with the next decision, and the spatial statistic."""
CONDITIONING = (TEXT + 1) * 16 + 3 * (TOKENS + TEXT)
"""Text, its mean, and the places of all tokens."""
UNCOUNTED = 5
"""The damping of the line, the length of its memory, the misses in a row (an int64, as long as two
of the others), and whether the forecast is lost."""


def tensors_held(site):
    """Bytes of tensors that hang on a site, of models and schedulers apart: an own walk."""
    seen, storages, stack = set(), {}, [site]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, (nn.Module, type)) or hasattr(x, "set_timesteps"):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, Mapping):
            stack += x.values()
        elif isinstance(x, (list, tuple, set)):
            stack += x
        elif type(x).__module__.startswith("xfuser_adacorr"):
            names = [n for c in type(x).__mro__ for n in getattr(c, "__slots__", ())]
            stack += [getattr(x, n) for n in names if hasattr(x, n)]
            stack += getattr(x, "__dict__", {}).values()
    return sum(storages.values())


@pytest.mark.parametrize("name", STATED_FLOATS)
@bare_or_not
def test_no_method_holds_more_than_its_stated_memory(name, bare):
    """The stated memory of the docs; tensors that are alive are counted at every step."""
    options = {} if name == "Auto" else {"rel_l1_thresh": 0.3}
    if name.startswith("Ada"):
        options["codebook"] = {0.1: 3, 9.0: 2}
    config = CacheConfig.from_name(name, **options)
    sampler, held = enabled(config, bare), []
    step = sampler.scheduler.step

    def counting(*args, **kwargs):
        out = step(*args, **kwargs)
        held.append(tensors_held(site_of(sampler.transformer)))
        return out

    sampler.scheduler.__dict__["step"] = counting
    sampler.run(STEPS, finish=False)
    summary = cache_summary(sampler.transformer)
    corrected = config.answers_steps
    of_pipeline = TOKENS * LATENT + STEPS  # the latents, and the timesteps
    if bare:
        of_pipeline = CONDITIONING  # the first call's, until the second one
    scalars = SCALARS + UNCOUNTED if corrected else 0
    if corrected and bare:
        of_pipeline += TOKENS * LATENT  # the payment over a guessed step, until the next refresh
    assert 4 * STATED_FLOATS[name] <= max(held)
    assert max(held) <= 4 * (STATED_FLOATS[name] + scalars + of_pipeline)
    stated = 4 * (STATED_FLOATS[name] + (SCALARS if corrected else 0))
    guessed = 4 * TOKENS * LATENT if corrected and bare else 0
    assert summary.cache_memory_bytes in (stated, stated + guessed)


# -- beside hooks, adapters and graphs of others ---------------------------------------------------


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
    assert cache_summary(sampler.transformer).num_steps == STEPS
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


@bare_or_not
def test_auto_caches_a_transformer_compiled_as_a_whole(sampler, bare):
    torch._dynamo.reset()
    sampler.transformer.compile(backend="eager")
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, CONFIGS[3], bare=bare, steps=STEPS)
    assert summary.reused_steps > 0
    assert (x - plain).norm() / plain.norm() < 0.1


def test_gradients_stand_the_cache_aside():
    """Where the output requires them every step is computed, and they are those without a cache."""
    gradients = []
    for config in (None, CONFIGS[3]):
        sampler = FluxSampler(make_tiny_flux())
        if config is not None:
            enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
        with torch.enable_grad():
            sampler.run(4, finish=False).square().mean().backward()
        gradients.append(sampler.transformer.proj_out.weight.grad)
    assert torch.equal(*gradients)
    reasons = [call.reason for call in cache_summary(sampler.transformer).trace.calls]
    assert reasons == ["first", "autograd", "autograd", "autograd"]
