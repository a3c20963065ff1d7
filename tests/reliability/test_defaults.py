"""Budgets under samplers that draw noise, and defaults in short runs."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from tests.samplers import Loop, relative_error
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import AdaCorrection, Auto, Fb, Schedule, cache_summary, enable_cache

STEPS = 20


def sampled(make, method=None):
    """Latents, and the computed steps, of a run whose sampler draws the same noise each time."""
    loop = Loop(make())
    if method is not None:
        enable_cache(loop.transformer, method, scheduler=loop.scheduler)
    torch.manual_seed(3)
    x = loop.run(STEPS)
    if method is None:
        return x, list(range(STEPS))
    calls = cache_summary(loop.transformer).trace.calls
    return x, [call.step_index for call in calls if call.refreshed]


@pytest.mark.parametrize("make", [EulerAncestralDiscreteScheduler, DDPMScheduler, LCMScheduler])
def test_a_budget_is_spread_where_the_sampler_draws_noise(make):
    """No worse than plainly reusing every second step, which computes one step more."""
    plain, _ = sampled(make)
    x, computed = sampled(make, Auto(target_compute=0.5))
    assert len(computed) == STEPS // 2
    assert max(b - a for a, b in pairwise([*computed, STEPS])) <= STEPS // 4
    reused, _ = sampled(make, Schedule(every=2, forecast="last"))
    assert relative_error(x, plain) <= 1.3 * relative_error(reused, plain)


@pytest.mark.parametrize("method", [Auto(), Fb(threshold=100.0, correction=AdaCorrection())])
@pytest.mark.parametrize("steps", [12, 20, 28])
def test_defaults_compute_two_thirds_of_a_run_at_the_most(method, steps):
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, method, scheduler=sampler.scheduler)
    sampler.run(steps, finish=False)
    assert cache_summary(sampler.transformer).computed_steps <= 0.7 * steps + 1


def test_a_tolerance_that_is_given_is_not_loosened():
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, Auto(tolerance=1e-9), scheduler=sampler.scheduler)
    sampler.run(12, finish=False)
    assert cache_summary(sampler.transformer).computed_steps == 12
