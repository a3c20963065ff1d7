"""Models and schedulers that are taken over: their copies, pickles, and what others see of them."""

import copy
import inspect
import pickle
from threading import Barrier, Thread

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from tests.cached import run_cached
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, cache_summary, disable_cache, enable_cache, is_cache_enabled
from xfuser_adacorr.model_executor.cache.intercept import (
    handler_of,
    intercept,
    is_intercepted,
    own_attributes,
    owner_of,
    release,
)

STEPS = 16
LOOSE = Auto(tolerance=0.02)


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


@pytest.fixture
def enabled(sampler):
    enable_cache(sampler.transformer, LOOSE, scheduler=sampler.scheduler)
    sampler.run(STEPS, stop_after=5, finish=False)
    return sampler


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, through_pickle])
def test_copies_of_a_model_are_plain(enabled, make):
    model = enabled.transformer
    copied = make(model)
    assert type(copied) is FluxTransformer2DModel
    assert not is_cache_enabled(copied) and not is_intercepted(copied)
    assert is_cache_enabled(model)
    blocks = [*copied.transformer_blocks, *copied.single_transformer_blocks]
    assert make is copy.copy or not any(is_intercepted(block) for block in blocks)
    x = FluxSampler(copied).run(4)
    assert torch.equal(x, FluxSampler(make_tiny_flux()).run(4))
    if make is not copy.copy:  # which shares the weights
        copied.proj_out.weight.zero_()
        assert model.proj_out.weight.abs().sum() > 0


def test_a_deep_copy_of_a_model_with_cached_blocks_is_plain(sampler):
    enable_cache(sampler.transformer, "Fb", rel_l1_thresh=0.5, scheduler=sampler.scheduler)
    copied = copy.deepcopy(sampler.transformer)
    assert not any(is_intercepted(module) for module in copied.modules())
    assert torch.equal(FluxSampler(copied).run(4), FluxSampler(make_tiny_flux()).run(4))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_copies_of_a_scheduler_are_taken_over_too(enabled, make):
    """Pipelines step copies: of one scheduler for video and sound."""
    copied = make(enabled.scheduler)
    assert copied is not enabled.scheduler
    assert is_intercepted(copied) and handler_of(copied) == handler_of(enabled.scheduler)
    assert copied.config == enabled.scheduler.config
    assert copied.step_index == enabled.scheduler.step_index == 5
    copied.set_timesteps(7)
    assert len(enabled.scheduler.timesteps) == STEPS


def test_a_pickle_of_a_scheduler_is_plain(enabled):
    loaded = through_pickle(enabled.scheduler)
    assert type(loaded) is FlowMatchEulerDiscreteScheduler and not is_intercepted(loaded)
    assert own_attributes(loaded).keys() == own_attributes(enabled.scheduler).keys()


def test_a_pipeline_may_step_a_copy_beside_the_scheduler(sampler):
    """As for video and sound: each has forecasts of its own, and skips what the other skips."""
    x, summary = run_cached(sampler, LOOSE, steps=STEPS)
    enable_cache(sampler.transformer, LOOSE, scheduler=sampler.scheduler)
    sampler.scheduler.set_timesteps(STEPS)
    sampler.scheduler.set_begin_index(0)
    copied, video, sound = copy.deepcopy(sampler.scheduler), sampler.noise(), sampler.noise()
    for t in sampler.scheduler.timesteps:
        v = sampler.call(video, t)
        video = sampler.scheduler.step(v, t, video, return_dict=False)[0]
        sound = copied.step(v, t, sound, return_dict=False)[0]
    assert torch.equal(video, x) and torch.equal(sound, x)
    assert 0 < cache_summary(sampler.transformer).computed_steps == summary.computed_steps < STEPS


def test_others_see_the_class_they_know(enabled):
    model, scheduler = enabled.transformer, enabled.scheduler
    assert isinstance(model, FluxTransformer2DModel)
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    parameters = inspect.signature(scheduler.step).parameters
    assert parameters == inspect.signature(FlowMatchEulerDiscreteScheduler().step).parameters
    assert type(type(scheduler).from_config(scheduler.config)) is FlowMatchEulerDiscreteScheduler


def test_a_call_goes_through_its_handler_until_it_is_released():
    layer, seen = torch.nn.Linear(2, 2), []
    x = torch.ones(1, 2)
    plain, attributes = layer(x), set(vars(layer))

    def handler(original, *args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs) + 1.0

    intercept(layer, handler, owner="me")
    assert torch.equal(layer(x), plain + 1.0) and torch.equal(layer(input=x), plain + 1.0)
    assert [bool(args) for args, _ in seen] == [True, False]
    assert owner_of(layer) == "me" and handler_of(layer) is handler
    release(layer)
    assert torch.equal(layer(x), plain) and set(vars(layer)) == attributes
    assert owner_of(layer) is None and handler_of(layer) is None and type(layer) is torch.nn.Linear


# -- threads ---------------------------------------------------------------------------------------


def in_threads(*functions):
    """Their results; all begin at once, and what one raises is raised here."""
    barrier, results = Barrier(len(functions)), {}

    def work(index, function):
        with torch.no_grad():
            barrier.wait(30)
            try:
                results[index] = function()
            except Exception as error:
                results[index] = error

    threads = [Thread(target=work, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[index] for index in range(len(functions))]


def test_pipelines_in_two_threads_that_share_a_transformer_do_not_mix():
    """One with a cache, and one whose scheduler the cache does not know: that one is plain."""
    model = make_tiny_flux()
    one, other = FluxSampler(model), FluxSampler(model)
    one.scheduler, other.scheduler = (FlowMatchEulerDiscreteScheduler() for _ in range(2))
    plain = other.run(STEPS, seed=3, finish=False)
    expected, _ = run_cached(one, LOOSE, steps=STEPS)
    enable_cache(model, LOOSE, scheduler=one.scheduler)
    x, y = in_threads(
        lambda: one.run(STEPS, finish=False), lambda: other.run(STEPS, seed=3, finish=False)
    )
    assert torch.equal(x, expected)
    assert torch.equal(y, plain)
    disable_cache(model)


def test_two_cached_pipelines_in_two_threads_do_not_mix():
    samplers = [FluxSampler(make_tiny_flux(seed)) for seed in (0, 1)]
    expected = [run_cached(each, LOOSE, steps=STEPS)[0] for each in samplers]
    for each in samplers:
        enable_cache(each.transformer, LOOSE, scheduler=each.scheduler)
    found = in_threads(*(lambda each=each: each.run(STEPS, finish=False) for each in samplers))
    for a, b, each in zip(found, expected, samplers, strict=True):
        assert torch.equal(a, b)
        assert cache_summary(each.transformer).reused_steps > 0


def test_contexts_of_threads_do_not_mix():
    """A branch that one thread names is not the other's."""
    model = make_tiny_flux()
    sampler = FluxSampler(model)
    enable_cache(model, LOOSE, scheduler=sampler.scheduler)
    context, barrier = owner_of(model).context, Barrier(2)

    def named():
        with model.cache_context("cond"):
            barrier.wait(30)
            inside = context.name
            barrier.wait(30)
        return inside, context.name

    def unnamed():
        barrier.wait(30)
        inside = context.name
        barrier.wait(30)
        return inside

    assert in_threads(named, unnamed) == [("cond", None), None]
