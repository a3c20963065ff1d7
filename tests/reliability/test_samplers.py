"""Samplers that tell little, that begin late, and that evaluate the model twice a step."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)

from tests.samplers import Loop
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.schedulers import describe_sampler, read_places

FB = {"rel_l1_thresh": 0.3}


def enabled(scheduler, method="Fb", **options):
    loop = Loop(scheduler)
    enable_cache(loop.transformer, method, scheduler=scheduler, **options)
    return loop


@pytest.mark.parametrize(
    "make", [DDIMScheduler, lambda: PNDMScheduler(skip_prk_steps=True)], ids=["ddim", "pndm"]
)
@pytest.mark.parametrize("begin", [0, 4])
def test_a_block_method_knows_where_a_late_run_begins(make, begin):
    """These samplers are not told: image-to-image cuts their timesteps."""
    loop = enabled(make(), **FB)
    loop.run(10, begin=begin)
    calls = cache_summary(loop.transformer).trace.calls
    steps = len(loop.scheduler.timesteps)
    assert [call.step_index for call in calls] == list(range(begin, steps))
    disable_cache(loop.transformer)


@pytest.mark.parametrize("method", ["Fb", "Auto"])
def test_steps_of_heun_are_the_samplers(method):
    options = FB if method == "Fb" else {"adacorr_tolerance": 0.05}
    loop = enabled(HeunDiscreteScheduler(), method, **options)
    loop.run(10)
    summary = cache_summary(loop.transformer)
    assert (summary.num_steps, summary.calls) == (10, 19)


@pytest.mark.parametrize("make", [DPMSolverMultistepInverseScheduler, IPNDMScheduler])
@pytest.mark.parametrize("method", ["Fb", "Auto"])
def test_samplers_that_tell_little_run(make, method):
    plain = Loop(make()).run(8)
    loop = enabled(make(), method, **({"rel_l1_thresh": 0.0} if method == "Fb" else {}))
    x = loop.run(8)
    assert cache_summary(loop.transformer).num_steps == 8
    assert x.isfinite().all() and (method == "Auto" or torch.equal(x, plain))


@pytest.mark.parametrize("make", [KarrasVeScheduler, ScoreSdeVeScheduler])
@pytest.mark.parametrize("method", ["Fb", "Auto"])
def test_samplers_without_a_usual_step_are_refused_when_enabled(make, method):
    with pytest.raises(ValueError, match=r"scheduler.*step"):
        enabled(make(), method)


def test_a_consistency_sampler_is_not_taken_for_flow_matching():
    """Its noise levels end at 80: its latents are a picture and so much noise."""
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(8)
    steps = read_places(scheduler).steps
    for step, level in zip(steps, scheduler.sigmas.tolist(), strict=False):
        angle = math.atan(level)
        assert step.sigma == pytest.approx(math.sin(angle))
        assert step.coordinate == pytest.approx(angle / (math.pi / 2))
        assert step.mass == pytest.approx(math.cos(angle) + math.sin(angle))
    assert [step.remaining for step in steps] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_scheduler_whose_config_is_no_mapping_is_cached():
    sampler = FluxSampler(make_tiny_flux())
    scheduler = sampler.scheduler
    expected = describe_sampler(scheduler)
    scheduler._internal_dict = SimpleNamespace(**scheduler.config)
    assert describe_sampler(scheduler) == expected
    enable_cache(sampler.transformer, "Auto", adacorr_tolerance=0.05, scheduler=scheduler)
    sampler.run(12, finish=False)
    assert cache_summary(sampler.transformer).reused_steps > 0
