"""AdaCorrection under diffusers' samplers: what repair gives, and what goes without."""

import logging

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

from tests.cached import computed
from tests.samplers import FLOW, SCHEDULERS, Loop, linear_loop, relative_error
from xfuser_adacorr import CacheConfig, Schedule, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache import adacorrection, messages

STEPS = 14
LOOSE = CacheConfig(use_cache="Auto", adacorr_tolerance=0.3)
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def by_turns(name, values):
    """Every scheduler, with one of the values each."""
    pairs = [(scheduler, values[i % len(values)]) for i, scheduler in enumerate(SCHEDULERS)]
    return pytest.mark.parametrize(("name", name), pairs)


def cached(loop, config=LOOSE, **kwargs):
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    try:
        return loop.run(STEPS, **kwargs), cache_summary(loop.transformer)
    finally:
        disable_cache(loop.transformer)


@by_turns("guidance", [None, 2.0])
def test_output_linear_in_time_gives_the_uncached_latents(name, guidance, monkeypatch):
    """The line through two refreshes is exact, so only steps skipped before the second are wrong,
    and the blend at that refresh is exact: everything is repaired to rounding."""
    loop = linear_loop(name)
    plain = loop.run(STEPS, guidance=guidance)
    x, summary = cached(loop, guidance=guidance)
    refreshed = computed(summary)
    assert 1 not in refreshed and len(refreshed) < STEPS - 3
    assert relative_error(x, plain) < 1e-4
    monkeypatch.setattr(adacorrection, "repair_of", lambda scheduler: "none")
    forecast_only, _ = cached(linear_loop(name), guidance=guidance)
    assert relative_error(forecast_only, plain) > 5 * relative_error(x, plain)


@by_turns("begin", [1, 5])
def test_a_run_that_begins_late_is_repaired_too(name, begin):
    """As image-to-image does with its strength."""
    loop = linear_loop(name)
    plain = loop.run(STEPS, begin=begin)
    x, summary = cached(loop, begin=begin)
    assert computed(summary)[0] == begin
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
def test_custom_schedules_are_repaired(make, schedule, monkeypatch):
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
    loop = linear_loop(name)
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    first = loop.run(STEPS)
    assert cache_summary(loop.transformer).reused_steps > 0
    loop.run(STEPS, stop_after=5)
    assert torch.equal(loop.run(STEPS), first)
    assert torch.equal(loop.run(STEPS), first)


# -- samplers without repair -----------------------------------------------------------------------


def run_with_warnings(loop, caplog, options):
    """Two equal runs, and the warnings that AdaCorrection gave."""
    messages.warn_once.cache_clear()
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    with caplog.at_level(logging.WARNING, logger=messages.__name__):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(loop.run(STEPS, step_options=options))
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()
    return [r.getMessage() for r in caplog.records if r.name == messages.__name__]


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
        (EulerAncestralDiscreteScheduler, {}),
        (DDPMScheduler, {}),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
        (DDIMScheduler, {"eta": 0.5}),
        (HeunDiscreteScheduler, {}),
        (FlowMatchHeunDiscreteScheduler, {}),
        (KDPM2DiscreteScheduler, {}),
        (EDMEulerScheduler, {}),
        (lambda: PNDMScheduler(skip_prk_steps=False), {}),
    ],
)
def test_samplers_that_cannot_be_repaired_get_the_forecast_alone_and_one_warning(
    make, options, caplog
):
    loop = Loop(make())
    warnings = run_with_warnings(loop, caplog, options)
    assert cache_summary(loop.transformer).reused_steps > 0
    assert len(warnings) == 1
    assert "without repair" in warnings[0] and type(loop.scheduler).__name__ in warnings[0]
    assert "DDIMScheduler" in warnings[0] and "UniPCMultistepScheduler" in warnings[0]


@every_scheduler
def test_samplers_that_are_repaired_give_no_warning(name, caplog):
    assert not run_with_warnings(linear_loop(name), caplog, {})


@pytest.mark.parametrize("make", [HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_both_evaluations_of_a_solver_step_are_decided_alike(make):
    loop = Loop(make())
    steps = [0, 3, 4, 8, 13]
    x, summary = cached(loop, Schedule(steps=steps, forecast="line"))
    evaluations = {i: [] for i in range(STEPS)}
    for call in summary.trace.calls:
        evaluations[call.step_index].append((call.refreshed, call.reason))
    assert [i for i, group in evaluations.items() if all(r for r, _ in group)] == steps
    for group in evaluations.values():
        assert len({refreshed for refreshed, _ in group}) == 1
        assert all(reason == "stage" for _, reason in group[1:])
    assert [len(group) for group in evaluations.values()] == [2] * (STEPS - 1) + [1]
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("make", "num_steps"),
    [
        (HeunDiscreteScheduler, STEPS),
        (KDPM2DiscreteScheduler, STEPS),
        (DDPMScheduler, STEPS),
        (EDMEulerScheduler, STEPS),
        (lambda: PNDMScheduler(skip_prk_steps=True), STEPS + 1),
    ],
)
def test_base_methods_alone_work_under_any_scheduler(make, num_steps):
    loop = Loop(make())
    config = CacheConfig(use_cache="Tea", rel_l1_thresh=0.4)
    _, summary = cached(loop, config)
    assert summary.num_steps == num_steps
    assert summary.reused_steps > 0 and summary.trace.calls[-1].reason == "last"
