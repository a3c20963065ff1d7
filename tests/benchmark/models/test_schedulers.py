"""Other solvers in the place of the pipeline's own."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from benchmark.models.families import DDIM, DPM_SOLVER, EULER, FAMILIES, UNIPC
from benchmark.models.schedulers import make_scheduler
from benchmark.small.noise import BETAS
from xfuser_adacorr.models import RectifiedFlowScheduler


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


def ddim():
    return DDIMScheduler(**BETAS, clip_sample=False)


def dpm_solver():
    return DPMSolverMultistepScheduler(**BETAS)


def rectified_flow():
    return RectifiedFlowScheduler(use_timestep_transform=False)


@pytest.mark.parametrize(
    ("own", "solver"), [(ddim(), DDIM), (dpm_solver(), DPM_SOLVER), (rectified_flow(), EULER)]
)
def test_the_own_solver_is_the_pipelines_own_scheduler(own, solver):
    assert make_scheduler(solver, own, 8) is own


def test_solvers_that_cannot_stand_in_are_refused():
    with pytest.raises(ValueError, match="one of DDIM, DPM-Solver\\+\\+, got 'Euler'"):
        make_scheduler(EULER, ddim(), 8)


def test_dpm_solver_starts_where_the_uncached_ddim_run_does():
    own, reference = ddim(), ddim()
    for steps in (50, 28):
        reference.set_timesteps(steps)
        scheduler = make_scheduler(DPM_SOLVER, own, steps)
        scheduler.set_timesteps(10)
        start = 1000 // steps * (steps - 1)
        assert scheduler.timesteps[0] == reference.timesteps[0] == start
        evenly = [round(start * (10 - i) / 10) for i in range(10)]
        assert scheduler.timesteps.tolist() == evenly
    assert own.num_inference_steps is None, "the pipeline's own scheduler was touched"


def test_unipc_takes_the_timesteps_of_dpm_solver():
    own, unipc = dpm_solver(), make_scheduler(UNIPC, dpm_solver(), 20)
    assert isinstance(unipc, UniPCMultistepScheduler)
    for scheduler in (own, unipc):
        scheduler.set_timesteps(9)
    assert torch.equal(unipc.timesteps, own.timesteps)
    torch.testing.assert_close(unipc.sigmas, own.sigmas)


def test_dpm_solver_takes_the_noise_levels_of_a_rectified_flow():
    own = RectifiedFlowScheduler()
    scheduler = make_scheduler(DPM_SOLVER, own, 20)
    for each in (own, scheduler):
        each.set_timesteps(7, height=256, width=256, num_frames=17)
    torch.testing.assert_close(scheduler.timesteps, own.timesteps)
    assert torch.equal(scheduler.sigmas, own.sigmas)


def flow_unipc():
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def test_dpm_solver_takes_the_noise_levels_of_a_flow_with_unipc():
    own = flow_unipc()
    assert make_scheduler(UNIPC, own, 20) is own
    scheduler = make_scheduler(DPM_SOLVER, own, 20)
    for each in (own, scheduler):
        each.set_timesteps(7)
    assert torch.equal(scheduler.sigmas, own.sigmas)
    assert torch.equal(scheduler.timesteps.long(), own.timesteps)
    assert torch.equal(scheduler.timesteps, 1000 * own.sigmas[:-1])


SPREAD = 0.5
"""Standard deviation of Gaussian data: their sampling ODE has a solution in closed form."""


def sampled(scheduler, steps, predict):
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, return_dict=False)[0]
    return x


def error_of_noise_solver(scheduler, steps, start):
    """Largest error of x(0) = x(start) SPREAD / sqrt(a SPREAD^2 + 1 - a)."""
    products = ddim().alphas_cumprod.double()

    def predict(x, t):
        share = products[int(t)]
        return ((1 - share).sqrt() / (share * SPREAD**2 + 1 - share) * x).float()

    share = products[start]
    exact = torch.linspace(-2, 2, 9).double() * SPREAD / (share * SPREAD**2 + 1 - share).sqrt()
    return (sampled(scheduler, steps, predict).flatten() - exact).abs().max().item()


def error_of_flow_solver(scheduler, steps, sign=1):
    """Largest error of x(0) = SPREAD x(1), for a velocity towards the data, or from it (-1)."""

    def predict(x, t):
        sigma = float(t) / 1000
        variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        clean, noise = (1 - sigma) * SPREAD**2 / variance * x, sigma / variance * x
        return sign * (clean - noise)

    exact = SPREAD * torch.linspace(-2, 2, 9)
    return (sampled(scheduler, steps, predict).flatten() - exact).abs().max().item()


def test_the_ode_of_dit_is_solved_from_where_the_uncached_run_starts():
    ode = FAMILIES["dit"].ode
    for steps, start in ((50, 980), (28, 945)):
        solver = make_scheduler(ode.solver, ddim(), steps)
        converged = error_of_noise_solver(solver, ode.steps, start)
        assert converged < 1e-3
        assert converged < 0.1 * error_of_noise_solver(ddim(), steps, start)


def test_the_ode_of_pixart_is_solved_from_the_last_training_timestep():
    ode = FAMILIES["pixart"].ode
    assert error_of_noise_solver(dpm_solver(), ode.steps, 999) < 1e-3


def test_unipc_solves_the_ode_of_pixart():
    unipc = make_scheduler(UNIPC, dpm_solver(), 20)
    assert error_of_noise_solver(unipc, FAMILIES["pixart"].ode.steps, 999) < 2e-3


def test_the_ode_of_opensora_is_solved_on_the_uncached_runs_noise_levels():
    ode = FAMILIES["opensora"].ode
    converged = error_of_flow_solver(make_scheduler(ode.solver, rectified_flow(), 30), ode.steps)
    assert converged < 2e-3
    assert converged < 0.1 * error_of_flow_solver(rectified_flow(), 30)


def test_the_ode_of_wan_is_solved_on_the_uncached_runs_noise_levels():
    ode = FAMILIES["wan"].ode
    solver = make_scheduler(ode.solver, flow_unipc(), 30)
    converged = error_of_flow_solver(solver, ode.steps, sign=-1)
    assert converged < 2e-3
    assert converged < error_of_flow_solver(flow_unipc(), 10, sign=-1)
