"""Open-Sora's sampler against its formulas, and AdaCorrection's compensation on it."""

import math
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.models import RectifiedFlowScheduler

STEPS = 20
CLIP = {"height": 720, "width": 1280, "num_frames": 51}


def expected_timesteps(num_steps, height, width, num_frames):
    latent_frames = 1 if num_frames == 1 else (num_frames // 17) * 5
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)
    uniform = [1 - i / num_steps for i in range(num_steps)]
    return [1000 * ratio * u / (1 + (ratio - 1) * u) for u in uniform]


@pytest.mark.parametrize(
    ("height", "width", "num_frames"), [(720, 1280, 51), (240, 424, 102), (256, 256, 1)]
)
def test_timesteps_are_transformed_by_the_size(height, width, num_frames):
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(30, height=height, width=width, num_frames=num_frames)
    expected = torch.tensor(expected_timesteps(30, height, width, num_frames))
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-6, atol=0)


def test_without_transform_timesteps_are_uniform():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


def test_sigmas_are_the_timesteps_over_1000_and_a_zero():
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(7, **CLIP)
    assert torch.equal(scheduler.sigmas[:-1], scheduler.timesteps / 1000)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.sigmas) == 8


def test_steps_follow_the_formula_in_float64():
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(5, **CLIP)
    times = [*expected_timesteps(5, **CLIP), 0.0]
    generator = torch.Generator().manual_seed(0)
    x, *velocities = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    expected = x
    for i, (t, v) in enumerate(zip(scheduler.timesteps, velocities, strict=True)):
        x = scheduler.step(v, t, x).prev_sample
        expected = expected + v * (times[i] - times[i + 1]) / 1000
        assert scheduler.step_index == i + 1
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_the_exact_velocity_leads_from_noise_to_the_clean_sample():
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(9, **CLIP)
    clean, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    x = scheduler.scale_noise(clean, scheduler.timesteps[0], noise)
    assert torch.equal(x, noise)
    for t in scheduler.timesteps:
        torch.testing.assert_close(x, (1 - t / 1000) * clean + t / 1000 * noise)
        (x,) = scheduler.step(clean - noise, t, x, return_dict=False)
    torch.testing.assert_close(x, clean)


def test_noise_is_scaled_for_each_sample():
    clean, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    x = RectifiedFlowScheduler().scale_noise(clean, torch.tensor([250.0, 1000.0]), noise)
    torch.testing.assert_close(x[0], 0.75 * clean[0] + 0.25 * noise[0])
    torch.testing.assert_close(x[1], noise[1])


def test_half_precision_is_stepped_in_float32():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(1000)
    x = torch.full((4,), 100.0, dtype=torch.bfloat16)
    stepped = scheduler.step(torch.full((4,), 300.0), scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(stepped, torch.full((4,), 100.3))


def test_a_run_can_begin_later():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(4)
    x, v = torch.zeros(2), torch.ones(2)
    found = scheduler.step(v, scheduler.timesteps[2], x).prev_sample
    assert scheduler.step_index == 3
    scheduler.set_timesteps(timesteps=[900.0, 300.0, 100.0])
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert scheduler.timesteps.tolist() == [900, 300, 100]
    scheduler.set_begin_index(1)
    told = scheduler.step(v, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(torch.cat([found, told]), torch.tensor([0.25, 0.25, 0.2, 0.2]))


def test_every_run_has_new_tensors():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps
    scheduler.set_timesteps(4)
    assert scheduler.timesteps is not before and torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_inference_steps or timesteps"),
        ({"num_inference_steps": 2, "timesteps": [2.0, 1.0]}, "num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 4}, "height"),
        ({"num_inference_steps": 4, "height": 64, "width": 64}, "num_frames"),
        ({"num_inference_steps": 4, "height": 64, "width": 64, "num_frames": 16}, "num_frames"),
        ({"timesteps": [500.0, 500.0]}, "timesteps"),
        ({"timesteps": [1001.0, 500.0]}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
    ],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler().set_timesteps(**options)


def test_a_foreign_timestep_is_named():
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(torch.zeros(1), 333.0, torch.zeros(1))


# -- under AdaCorrection -------------------------------------------------------------------------


def clip_scheduler():
    """A scheduler with unequal steps that a sampler may call with the number of steps alone."""
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps = partial(scheduler.set_timesteps, **CLIP)
    return scheduler


def cached_run(sampler, tolerance):
    config = CacheConfig(use_cache="Auto", enable_adacorrection=True, adacorr_tolerance=tolerance)
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    summary = cache_summary(sampler.transformer)
    disable_cache(sampler.transformer)
    return x, summary


@pytest.mark.parametrize("tolerance", [0.003, 0.03, 0.3])
def test_linear_velocity_is_compensated_to_rounding(transformer, tolerance):
    """An output linear in sigma is blended exactly, whatever the sign of the step."""
    a, b = torch.randn(2, 1, 16, 8, generator=torch.Generator().manual_seed(5))

    def forward(hidden_states, timestep, return_dict=True, **kwargs):
        return (a + b * timestep.view(-1, 1, 1),)

    transformer.forward = forward
    sampler = FluxSampler(transformer, clip_scheduler())
    plain = sampler.run(STEPS)
    x, summary = cached_run(sampler, tolerance)
    assert summary.compute_fraction < 1.0
    torch.testing.assert_close(x, plain, rtol=4e-6, atol=4e-6)


def test_opposite_velocity_equals_flow_matching():
    """A model with the opposite output takes the same decisions to the same sample."""
    flow_matching = FlowMatchEulerDiscreteScheduler()
    sigmas = [t / 1000 for t in expected_timesteps(STEPS, **CLIP)]
    flow_matching.set_timesteps = partial(flow_matching.set_timesteps, sigmas=sigmas)
    expected, reference = cached_run(FluxSampler(make_tiny_flux(), flow_matching), 0.02)
    opposite = make_tiny_flux()
    opposite.proj_out.weight.neg_()
    opposite.proj_out.bias.neg_()
    x, summary = cached_run(FluxSampler(opposite, clip_scheduler()), 0.02)
    refreshed = [call.refreshed for call in summary.trace.calls]
    assert refreshed == [call.refreshed for call in reference.trace.calls]
    assert not all(refreshed)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
