"""What is read of diffusers' samplers, against their formulas."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict

from tests.samplers import FLOW, SCHEDULERS
from xfuser_adacorr import enable_cache
from xfuser_adacorr.model_executor.cache.forecasts import as_output, as_velocity
from xfuser_adacorr.model_executor.cache.schedulers import (
    describe_sampler,
    log_snrs,
    read_places,
    repair_of,
)

STEPS = 14
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def places_of(scheduler, steps=STEPS):
    scheduler.set_timesteps(steps)
    return read_places(scheduler).steps


@every_scheduler
def test_places_have_an_entry_for_every_step_and_fall(name):
    scheduler = SCHEDULERS[name]()
    steps = places_of(scheduler)
    calls = len(scheduler.timesteps)
    assert [step.index for step in steps] == list(range(calls))
    assert [step.remaining for step in steps] == list(range(calls, 0, -1))
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    assert all(step.exact and not step.follows for step in steps)
    assert all(0.0 < step.step_gain < 1.6 for step in steps if name != "pndm")
    for before, after in pairwise(steps):
        assert after.sigma == pytest.approx(before.sigma_next)
        assert after.coordinate < before.coordinate or name == "pndm"
    assert 0.9 < steps[0].coordinate < 1.01 and steps[-1].coordinate < 0.2


@pytest.mark.parametrize(
    "make", [lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), SCHEDULERS["unipc-3-flow"]]
)
def test_places_of_flow_matching_are_its_sigmas(make):
    scheduler = make()
    steps = places_of(scheduler)
    sigmas = scheduler.sigmas.double()
    for step, (sigma, after) in zip(steps, pairwise(sigmas), strict=True):
        assert (step.sigma, step.sigma_next) == pytest.approx((float(sigma), float(after)))
        assert step.coordinate == step.sigma
        assert step.step_gain == pytest.approx(float(sigma - after))
        assert (step.velocity, step.scale, step.mass) == ((1.0, 0.0), 1.0, 1.0)


OUTPUTS = {
    "epsilon": lambda x0, noise, cos, sin: noise,
    "sample": lambda x0, noise, cos, sin: x0,
    "v_prediction": lambda x0, noise, cos, sin: cos * noise - sin * x0,
}


def assert_velocity_is_noise_minus_picture(step, latents, output, x0, noise):
    velocity = as_velocity(output, latents, step)
    torch.testing.assert_close(velocity, (noise - x0).float(), rtol=2e-3, atol=2e-3)
    restored = as_output(velocity, latents, step)
    torch.testing.assert_close(restored, output.float(), rtol=1e-3, atol=1e-3)


def pictures():
    return torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("prediction", OUTPUTS)
@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler])
def test_places_of_ddpms_betas(make, prediction):
    """x = cos(phi) x0 + sin(phi) noise with cos(phi)^2 the cumulative product of alphas."""
    scheduler = make(prediction_type=prediction)
    steps = places_of(scheduler)
    x0, noise = pictures()
    times = scheduler.timesteps.tolist()
    for step, t, after in zip(steps, times, [*times[1:], None], strict=True):
        alpha = float(scheduler.alphas_cumprod[t].double())
        alpha_next = 1.0 if after is None else float(scheduler.alphas_cumprod[after].double())
        cos, sin = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        assert step.sigma == pytest.approx(sin)
        assert step.coordinate == pytest.approx(t / 1000)
        assert step.mass == pytest.approx(cos + sin) and step.scale == 1.0
        if step.remaining > 1:
            assert step.sigma_next == pytest.approx(math.sqrt(1.0 - alpha_next))
        latents = cos * x0 + sin * noise
        output = OUTPUTS[prediction](x0, noise, cos, sin)
        assert_velocity_is_noise_minus_picture(step, latents, output, x0, noise)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_places_at_zero_terminal_snr(prediction):
    """The first step stands at pure noise: what is predicted still tells the velocity."""
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction
    )
    first = places_of(scheduler)[0]
    x0, noise = pictures()
    assert first.sigma == pytest.approx(1.0)
    output = OUTPUTS[prediction](x0, noise, 0.0, 1.0)
    assert_velocity_is_noise_minus_picture(first, noise, output, x0, noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("make", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_places_of_variance_exploding_samplers(make, prediction):
    """Latents are x0 + level * noise, which pipelines divide by sqrt(level^2 + 1)."""
    scheduler = make(prediction_type=prediction)
    steps = places_of(scheduler)
    x0, noise = pictures()
    for step, level in zip(steps, scheduler.sigmas.double(), strict=False):
        angle = math.atan(float(level))
        assert step.sigma == pytest.approx(math.sin(angle))
        assert step.scale == pytest.approx(1.0 / math.sqrt(float(level) ** 2 + 1.0))
        latents = x0 + level * noise
        scheduler._step_index = step.index
        scaled = scheduler.scale_model_input(latents, scheduler.timesteps[step.index])
        torch.testing.assert_close(scaled, step.scale * latents, rtol=1e-4, atol=1e-4)
        output = OUTPUTS[prediction](x0, noise, math.cos(angle), math.sin(angle))
        assert_velocity_is_noise_minus_picture(step, latents, output, x0, noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("make", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_places_of_edm(make, prediction):
    """The picture is ``c_skip x + c_out F`` of the model's output F, as the scheduler has it."""
    scheduler = make(prediction_type=prediction)
    steps = places_of(scheduler)
    x0, noise = pictures()
    for step, level in zip(steps, scheduler.sigmas.double(), strict=False):
        latents = x0 + level * noise
        data = scheduler.config.sigma_data
        skip = data**2 / (level**2 + data**2)
        out = level * data / (level**2 + data**2).sqrt()
        output = (x0 - skip * latents) / (out if prediction == "epsilon" else -out)
        sample = scheduler.precondition_outputs(latents, output, level)
        torch.testing.assert_close(sample, x0)  # the formula is the scheduler's
        velocity = as_velocity(output, latents, step)
        wanted = (noise - x0).float()
        assert float((velocity - wanted).norm() / wanted.norm()) < 0.01
        assert step.coordinate == pytest.approx(math.atan(float(level)) / (math.pi / 2))
        assert step.sigma == pytest.approx(math.sin(math.atan(float(level))))


class Unknown:
    """A sampler that tells nothing but its timesteps."""

    config = FrozenDict()

    def __init__(self, timesteps):
        self.timesteps = torch.tensor(timesteps)

    def step(self, model_output, timestep, sample):
        return (sample,)


def test_places_of_an_unknown_sampler_are_its_timesteps_over_the_largest():
    steps = read_places(Unknown([800.0, 500.0, 100.0])).steps
    assert [step.sigma for step in steps] == pytest.approx([1.0, 0.625, 0.125])
    assert [step.coordinate for step in steps] == pytest.approx([1.0, 0.625, 0.125])
    assert [step.sigma_next for step in steps] == pytest.approx([0.625, 0.125, 0.0])
    assert [step.step_gain for step in steps] == pytest.approx([0.375, 0.5, 0.125])
    assert all(step.velocity == (1.0, 0.0) for step in steps)
    assert [step.remaining for step in steps] == [3, 2, 1]


def test_an_unknown_sampler_may_stand_at_zero():
    assert [step.sigma for step in read_places(Unknown([0.0])).steps] == [0.0]


@pytest.mark.parametrize("make", [HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_steps_of_heun_like_samplers_are_the_solvers(make):
    """Of 2 N - 1 calls the second of each step follows; the last step makes one."""
    steps = places_of(make(), 5)
    assert [step.index for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert [step.follows for step in steps] == [False, True] * 4 + [False]
    assert [step.remaining for step in steps] == [5, 5, 4, 4, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("make", [DDIMScheduler, lambda: PNDMScheduler(skip_prk_steps=True)])
def test_a_run_that_begins_late_is_placed_by_its_timestep(make):
    """Also where one repeats (PNDM): its first call."""
    scheduler = make()
    scheduler.set_timesteps(10)
    places, times = read_places(scheduler), scheduler.timesteps.tolist()
    for t in times:
        assert places.nearest(t * (1 + 1e-4)) == times.index(t)


def test_sigmas_hold_what_the_last_step_steps_to():
    scheduler = SCHEDULERS["flow-euler"]()
    scheduler.set_timesteps(4)
    assert read_places(scheduler).sigmas == pytest.approx(scheduler.sigmas.tolist())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (FlowMatchEulerDiscreteScheduler, "euler"),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "none"),
        (FlowMatchHeunDiscreteScheduler, "none"),
        (DDIMScheduler, "resample"),
        (DDPMScheduler, "none"),
        (EulerDiscreteScheduler, "resample"),
        (EulerAncestralDiscreteScheduler, "none"),
        (DPMSolverMultistepScheduler, "resample"),
        (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "none"),
        (lambda: PNDMScheduler(skip_prk_steps=True), "resample"),
        (PNDMScheduler, "none"),
        (UniPCMultistepScheduler, "resample"),
        (lambda: UniPCMultistepScheduler(solver_p=DDIMScheduler()), "none"),
        (EDMEulerScheduler, "none"),
    ],
)
def test_repair_that_fits_a_sampler(make, kind):
    assert repair_of(make()) == kind


def test_options_that_change_what_a_step_does_are_described():
    described = describe_sampler(DPMSolverMultistepScheduler(solver_order=3, **FLOW))
    assert (described["class"], described["solver_order"]) == ("DPMSolverMultistepScheduler", 3)
    assert described["prediction_type"] == "flow_prediction"
    assert "flow_shift" not in described  # the noise levels have it


def test_something_that_is_no_scheduler_is_refused(transformer):
    with pytest.raises(ValueError, match=r"scheduler must have timesteps.*object lacks timesteps"):
        enable_cache(transformer, "Fb", scheduler=object())


def test_a_scheduler_whose_step_takes_other_arguments_is_refused(transformer):
    other = Unknown([1.0])
    other.step = lambda model_output, sample: None
    with pytest.raises(ValueError, match=r"step\(\) of Unknown must take.*it lacks timestep"):
        enable_cache(transformer, "Auto", scheduler=other)


def test_log_snr_of_flow_and_of_variance_preserving_schedules():
    flow = SCHEDULERS["flow-euler"]()
    flow.set_timesteps(8)
    x = flow.sigmas[1:-1].double()
    found = torch.tensor(log_snrs(read_places(flow))[1:]).double()
    torch.testing.assert_close(found, 2 * torch.log((1 - x) / x), rtol=1e-4, atol=1e-4)
    ddim = SCHEDULERS["ddim"]()
    ddim.set_timesteps(8)
    alphas = ddim.alphas_cumprod[ddim.timesteps].double()
    found = torch.tensor(log_snrs(read_places(ddim))[1:]).double()
    wanted = torch.log(alphas / (1 - alphas))[1:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for scheduler in (flow, ddim):
        logs = log_snrs(read_places(scheduler))
        assert logs == sorted(logs)
