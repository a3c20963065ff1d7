"""AdaCorrection under diffusers' samplers: the schedule, and properties of the compensation."""

import logging
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.samplers import FLOW, SCHEDULERS, Loop, linear_loop, relative_error
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.schedule import (
    followed,
    fractional_index,
    noise_angle,
    velocity_weights,
)
from xfuser_adacorr.model_executor.cache import correction
from xfuser_adacorr.model_executor.cache.samplers import read_schedule

STEPS = 14
LOOSE = CacheConfig(use_cache="Auto", adacorr_tolerance=0.3)
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def cached(loop, config=LOOSE, **kwargs):
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    try:
        return loop.run(STEPS, **kwargs), cache_summary(loop.transformer)
    finally:
        disable_cache(loop.transformer)


def refreshed_steps(summary):
    return [call.step_index for call in summary.trace.calls if call.refreshed]


@every_scheduler
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_output_linear_in_time_gives_the_uncached_latents(name, guidance, monkeypatch):
    """The line through two refreshes is exact, so only the call reused before the second is wrong,
    and the blend at that refresh is exact: everything is repaired to rounding."""
    loop = linear_loop(name)
    plain = loop.run(STEPS, guidance=guidance)
    x, summary = cached(loop, guidance=guidance)
    refreshed = refreshed_steps(summary)
    assert 1 not in refreshed and len(set(refreshed)) < STEPS - 3
    assert relative_error(x, plain) < 1e-4
    monkeypatch.setattr(correction, "mending_of", lambda scheduler: "none")
    forecast_only, _ = cached(linear_loop(name), guidance=guidance)
    assert relative_error(forecast_only, plain) > 5 * relative_error(x, plain)


@every_scheduler
@pytest.mark.parametrize("begin", [1, 5])
def test_a_run_that_begins_late_is_compensated_too(name, begin):
    """As image-to-image does with its strength."""
    loop = linear_loop(name)
    plain = loop.run(STEPS, begin=begin)
    x, summary = cached(loop, begin=begin)
    assert refreshed_steps(summary)[0] == begin
    assert summary.trace.calls[-1].step_index == len(loop.scheduler.timesteps) - 1
    assert summary.reused_steps > 0
    assert relative_error(x, plain) < 1e-4


@pytest.mark.parametrize(
    "make, schedule",
    [
        (
            lambda: FlowMatchEulerDiscreteScheduler(),
            {"sigmas": [1.0, 0.97, 0.9, 0.8, 0.72, 0.5, 0.4, 0.3, 0.1]},
        ),
        (
            lambda: UniPCMultistepScheduler(**FLOW),
            {"sigmas": np.array([0.99, 0.97, 0.9, 0.8, 0.72, 0.5, 0.4, 0.3, 0.1])},
        ),
        (
            lambda: DPMSolverMultistepScheduler(),
            {"timesteps": [999, 950, 900, 810, 700, 500, 400, 250, 60]},
        ),
    ],
)
def test_custom_schedules_are_compensated(make, schedule, monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "custom", make)
    loop = linear_loop("custom")
    plain = loop.run(schedule=schedule)
    x, summary = cached(loop, schedule=schedule)
    assert summary.num_steps == 9 and summary.reused_steps > 0
    assert relative_error(x, plain) < 1e-4


@every_scheduler
def test_a_cache_that_never_hits_is_bit_equal(name):
    loop = Loop(SCHEDULERS[name]())
    plain = loop.run(STEPS)
    x, summary = cached(loop, CacheConfig(use_cache="Auto", adacorr_gamma=1e12))
    assert summary.compute_fraction == 1.0
    assert torch.equal(x, plain)


@every_scheduler
def test_runs_after_another_or_after_a_cancelled_one_are_equal(name):
    loop = Loop(SCHEDULERS[name]())
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    first = loop.run(STEPS)
    assert cache_summary(loop.transformer).reused_steps > 0
    loop.run(STEPS, stop_after=5)
    assert torch.equal(loop.run(STEPS), first)
    assert torch.equal(loop.run(STEPS), first)


# -- the schedule ---------------------------------------------------------------------------------


def test_followed_is_the_derivative_of_ddims_step_by_the_output():
    """DDIM written out; relative to the latents' scale before the step."""
    alpha, alpha_next = 0.3, 0.55
    ends = {}
    for prediction in ("epsilon", "sample", "v_prediction"):

        def step(output, prediction=prediction, x=0.7):
            root, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
            x0 = {
                "epsilon": (x - noise * output) / root,
                "sample": output,
                "v_prediction": root * x - noise * output,
            }[prediction]
            eps = (x - root * x0) / noise
            return math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * eps

        ends[prediction] = abs(step(1.0) - step(0.0))
    angle, following = noise_angle(alpha), noise_angle(alpha_next)
    scale = math.cos(following) / math.cos(angle)  # from the scale after the step
    for prediction in ("epsilon", "sample"):
        assert followed(prediction, angle, following) * scale == pytest.approx(ends[prediction])
    assert math.sin(followed("v_prediction", angle, following)) == pytest.approx(
        ends["v_prediction"]
    )
    level, level_next = math.tan(angle), math.tan(following)
    assert followed("epsilon", angle, following) == pytest.approx(
        abs(level_next - level) / math.sqrt(1 + level**2)
    )


@pytest.mark.parametrize("angle", [0.01, 0.7, 1.56])
def test_velocity_weights_give_noise_minus_picture(angle):
    x0, noise = 0.7, -1.3
    latents = math.cos(angle) * x0 + math.sin(angle) * noise
    outputs = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": math.cos(angle) * noise - math.sin(angle) * x0,
    }
    for prediction, output in outputs.items():
        p, q = velocity_weights(prediction, angle)
        assert p * output + q * latents == pytest.approx(noise - x0)


def test_followed_is_finite_at_zero_terminal_snr():
    assert followed("v_prediction", noise_angle(0.0), noise_angle(0.1)) < math.pi / 2
    assert followed("epsilon", noise_angle(0.0), noise_angle(0.1)) == pytest.approx(1.0)


def test_fractional_index_interpolates_and_goes_on_outside():
    table = [0.0, 1.0, 3.0]
    assert [fractional_index(table, v) for v in (0.0, 0.5, 2.0, 3.0, 5.0, -1.0)] == [
        *(0.0, 0.5, 1.5, 2.0, 3.0, -1.0)
    ]


@every_scheduler
def test_schedules_have_an_entry_for_every_call_and_fall(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    schedule, calls = read_schedule(scheduler), len(scheduler.timesteps)
    assert len(schedule.coordinates) == len(schedule.followed) == calls == len(schedule.sigmas) - 1
    assert all(0.0 < step < 1.6 for step in schedule.followed if name != "pndm")
    ends = zip(schedule.coordinates, schedule.coordinates[1:], strict=False)
    assert all(b < a or name == "pndm" for a, b in ends)
    assert 0.9 < schedule.coordinates[0] < 1.01 and schedule.coordinates[-1] < 0.2


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("make", [DDIMScheduler, lambda: PNDMScheduler(skip_prk_steps=True)])
def test_calls_are_placed_by_their_timestep(make, scale):
    """Whether the transformer is given timesteps or fractions; also where one repeats."""
    from xfuser_adacorr.model_executor.cache.clock import SchedulerClock

    scheduler = make()
    scheduler.set_timesteps(10)
    clock = SchedulerClock(lambda: scheduler)
    assert clock.run_began() and not clock.run_began()
    last, places = None, []
    for calls, t in enumerate(scheduler.timesteps.tolist()):
        last = clock.locate(calls, t * scale * (1 + 1e-4), last)
        places.append((last.index, last.remaining))
    total = len(scheduler.timesteps)
    assert places == [(i, total - i) for i in range(total)]
    again = clock.locate(0, scheduler.timesteps.tolist()[0] * scale, last)
    assert not clock.continues(last, again)


# -- samplers without compensation ----------------------------------------------------------------


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
        (EulerAncestralDiscreteScheduler, {}),
        (DDPMScheduler, {}),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
        (DDIMScheduler, {"eta": 0.5}),
    ],
)
def test_stochastic_samplers_get_the_forecast_alone_and_one_warning(make, options, caplog):
    correction._warn_once.cache_clear()
    loop = Loop(make())
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    with caplog.at_level(logging.WARNING, logger=correction.__name__):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(loop.run(STEPS, step_options=options))
    assert cache_summary(loop.transformer).reused_steps > 0
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()
    warnings = [r.getMessage() for r in caplog.records if r.name == correction.__name__]
    assert len(warnings) == 1
    assert "without compensation" in warnings[0] and type(loop.scheduler).__name__ in warnings[0]


@pytest.mark.parametrize(
    "make",
    [
        HeunDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        EDMEulerScheduler,
        lambda: PNDMScheduler(skip_prk_steps=False),
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True),
    ],
)
def test_what_cannot_be_corrected_is_refused(make, transformer):
    with pytest.raises(ValueError, match=r"scheduler.*for AdaCorrection"):
        enable_cache(transformer, "Auto", scheduler=make())


def test_the_refusal_names_what_is_accepted(transformer):
    with pytest.raises(ValueError, match="DDIMScheduler.*UniPCMultistepScheduler"):
        enable_cache(transformer, "Auto", scheduler=HeunDiscreteScheduler())


def test_something_that_is_no_scheduler_is_refused(transformer):
    with pytest.raises(ValueError, match="timesteps and a config.*got object"):
        enable_cache(transformer, "Fb", scheduler=object())


def test_a_scheduler_swapped_for_an_impossible_one_is_refused_in_the_run():
    loop = Loop(SCHEDULERS["dpm-2"]())

    class Pipe:
        transformer, scheduler = loop.transformer, loop.scheduler

    enable_cache(Pipe, "Auto")
    Pipe.scheduler = loop.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="once a step"):
        loop.run(STEPS)


@pytest.mark.parametrize(
    "make",
    [HeunDiscreteScheduler, KDPM2DiscreteScheduler, DDPMScheduler, EDMEulerScheduler],
)
def test_base_methods_alone_work_under_any_scheduler(make):
    loop = Loop(make())
    config = CacheConfig(use_cache="Tea", rel_l1_thresh=0.4)
    _, summary = cached(loop, config)
    assert summary.num_steps == len(loop.scheduler.timesteps)
    assert summary.reused_steps > 0 and summary.trace.calls[-1].reason == "last"
