"""The engine against AdaCorrection on one page."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.reference import sample

STEPS = 24


@pytest.fixture(scope="module")
def sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FluxSampler(make_tiny_flux().double(), scheduler)


def by_the_page(sampler, **options):
    sampler.scheduler.set_timesteps(STEPS)
    return sample(
        lambda x, sigma: sampler.call(x, 1000 * sigma),
        sampler.noise().double(),
        sampler.scheduler.sigmas.tolist(),
        **options,
    )


def by_the_engine(sampler, **options):
    """The latents, and the computed steps."""
    x, scheduler = sampler.noise().double(), sampler.scheduler
    enable_cache(sampler.transformer, Auto(**options), scheduler=scheduler)
    try:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(sampler.call(x, t), t, x, return_dict=False)[0]
        records = cache_summary(sampler.transformer).trace.calls
    finally:
        disable_cache(sampler.transformer)
    return x, [record.step_index for record in records if record.refreshed]


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 0.001},
        {"tolerance": 0.004},
        {"tolerance": 0.02, "gamma": 2.0},
        {"tolerance": 0.1, "lambda_": 0.0},
        {"tolerance": 0.004, "gamma": 0.5, "lambda_": 10.0},
    ],
)
def test_the_engine_does_what_the_page_says(sampler, options):
    latents, computed = by_the_page(sampler, **options)
    found, steps = by_the_engine(sampler, **options)
    assert steps == computed and 3 <= len(steps) < STEPS
    # the engine keeps its histories in float32
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-6)


def test_outputs_that_are_linear_in_sigma_are_sampled_exactly():
    slope, start = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(3)).double()
    sigmas = torch.linspace(1, 0, 29).double().tolist()

    def velocity(x, sigma):
        return start + sigma * slope

    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(4)).double()
    plain = x
    for s, s_next in pairwise(sigmas):
        plain = plain + (s_next - s) * velocity(plain, s)
    sampled, computed = sample(velocity, x, sigmas, tolerance=1.0)
    assert len(computed) < 8
    torch.testing.assert_close(sampled, plain, rtol=1e-12, atol=1e-12)
