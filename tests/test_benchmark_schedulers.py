"""DPM-Solver++ in the place of the pipeline's Euler solver."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmark.schedulers import DPM_SOLVER, EULER, make_scheduler


def euler(**options):
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def test_euler_is_the_pipelines_own_scheduler():
    own = euler()
    assert make_scheduler(EULER, own, 8) is own


def test_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="accepted|one of Euler"):
        make_scheduler("Heun", euler(), 8)


def test_the_sigmas_are_shifted_as_the_pipelines_and_end_at_zero():
    mu, steps = 0.47, 10
    scheduler = make_scheduler(DPM_SOLVER, euler(use_dynamic_shifting=True), 8)
    scheduler.set_timesteps(steps, mu=mu)
    uniform = [0.999 * (steps - i) / steps for i in range(steps)]
    expected = [math.exp(mu) * s / (1 + (math.exp(mu) - 1) * s) for s in uniform] + [0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_model_is_told_the_sigma_that_the_solver_uses():
    scheduler = make_scheduler(DPM_SOLVER, euler(use_dynamic_shifting=True), 8)
    scheduler.set_timesteps(7, mu=0.6)
    torch.testing.assert_close(scheduler.timesteps / 1000, scheduler.sigmas[:-1])


def test_without_dynamic_shifting_the_static_shift_counts_and_mu_does_not():
    scheduler = make_scheduler(DPM_SOLVER, euler(), 8)
    scheduler.set_timesteps(4, mu=0.6)
    assert float(scheduler.sigmas[2]) == pytest.approx(3 * 0.4995 / (1 + 2 * 0.4995), abs=1e-6)


def test_the_pipeline_finds_what_it_computes_mu_from():
    own = euler(use_dynamic_shifting=True, base_shift=0.7, base_image_seq_len=64)
    config = make_scheduler(DPM_SOLVER, own, 8).config
    assert (config.get("base_shift"), config.get("base_image_seq_len")) == (0.7, 64)


def test_straight_paths_are_followed_exactly():
    """For x(sigma) = data + sigma (noise - data) the velocity is constant."""
    scheduler = make_scheduler(DPM_SOLVER, euler(), 8)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = scheduler.sigmas[0].double()
    x = (data + sigma * (noise - data)).float()
    for t in scheduler.timesteps:
        x = scheduler.step((noise - data).float(), t, x, return_dict=False)[0]
    torch.testing.assert_close(x.double(), data, atol=1e-4, rtol=0)
