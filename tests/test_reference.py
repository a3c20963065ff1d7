"""The engine against AdaCorrection on one page."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.adacorrection.euler import EulerRepair
from xfuser_adacorr.reference import sample

STEPS = 24


@pytest.fixture(scope="module")
def sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return FluxSampler(make_tiny_flux().double(), scheduler)


def by_the_page(sampler, guided=lambda output, sigma: output, **options):
    sampler.scheduler.set_timesteps(STEPS)
    return sample(
        lambda x, sigma: guided(sampler.call(x, 1000 * sigma), sigma),
        sampler.noise().double(),
        sampler.scheduler.sigmas.tolist(),
        **options,
    )


def by_the_engine(sampler, guided=lambda output, sigma: output, **options):
    """The latents, the computed steps, and what their forecasts missed."""
    x, scheduler = sampler.noise().double(), sampler.scheduler
    enable_cache(sampler.transformer, Auto(**options), scheduler=scheduler)
    try:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            output = guided(sampler.call(x, t), float(t) / 1000)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        records = cache_summary(sampler.transformer).trace.calls
    finally:
        disable_cache(sampler.transformer)
    refreshed = [record for record in records if record.refreshed]
    offsets = [record.found_offset for record in refreshed]
    return x, [record.step_index for record in refreshed], offsets


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
    found, steps, _ = by_the_engine(sampler, **options)
    assert steps == computed and 3 <= len(steps) < STEPS
    # the engine keeps its histories in float32
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-6)


def test_nothing_is_repaired_where_the_forecast_is_lost(sampler, monkeypatch):
    """Outputs that turn round between refreshes: both leave the latents to the forecasts."""

    def guided(output, sigma):
        return math.cos(25.0 * sigma) * output

    latents, computed = by_the_page(sampler, guided, tolerance=0.1)
    found, steps, offsets = by_the_engine(sampler, guided, tolerance=0.1)
    assert steps == computed
    misses = list(filter(None, offsets))
    assert any(min(three) >= 0.8 for three in zip(misses, misses[1:], misses[2:], strict=False))
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-6)
    own = EulerRepair.refresh

    def repaired_always(self, original, arguments, step, fresh, forecast):
        forecast.lost = None
        return own(self, original, arguments, step, fresh, forecast)

    monkeypatch.setattr(EulerRepair, "refresh", repaired_always)
    repaired, _, _ = by_the_engine(sampler, guided, tolerance=0.1)
    assert not torch.allclose(repaired, latents, rtol=1e-3)


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
