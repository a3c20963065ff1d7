"""Searched schedules: stored beside a model, bound to it, its sampler and its noise levels."""

import json
from dataclasses import replace

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tests.cached import computed
from tests.cached import run_cached as run_of
from tests.samplers import SCHEDULERS, Loop
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import CacheConfig, enable_cache
from xfuser_adacorr.model_executor.cache.calibration.stored_schedule import (
    StoredSchedule,
    load_schedule,
    save_schedule,
)
from xfuser_adacorr.model_executor.cache.schedulers import describe_sampler, read_places

STEPS = 12
LISTED = (0, 1, 4, 5, 9)


def run_cached(sampler, config, **kwargs):
    return run_of(sampler, config, **{"steps": STEPS, **kwargs})


def stored_for(looped, path, **changes):
    looped.scheduler.set_timesteps(STEPS)
    stored = StoredSchedule(
        refreshed=LISTED,
        stand_in="adacorrection",
        sampler=describe_sampler(looped.scheduler),
        levels=tuple(read_places(looped.scheduler).coordinates),
        score_db=50.0,
    )
    save_schedule(path, replace(stored, **changes), looped.transformer, {"seed": 0})
    return CacheConfig(use_cache="Schedule", enable_adacorrection=True, calibration=str(path))


def test_stored_schedule_is_used_beside_the_model(tmp_path, sampler):
    config = replace(stored_for(sampler, tmp_path / "schedule.json"), stored=None)
    with pytest.raises(FileNotFoundError, match="no schedule.json beside the model"):
        enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    sampler.transformer.register_to_config(_name_or_path=str(tmp_path))
    assert computed(run_cached(sampler, config)[1]) == list(LISTED)
    content = json.loads((tmp_path / "schedule.json").read_text())
    assert (content["budget"], content["num_steps"]) == (len(LISTED), STEPS)


def test_stored_schedule_says_what_it_is_not_for(tmp_path, sampler):
    path = tmp_path / "s.json"
    config = stored_for(sampler, path)
    with pytest.raises(ValueError, match="was searched for another model"):
        load_schedule(make_tiny_flux(seed=1), str(path), "adacorrection")
    with pytest.raises(ValueError, match="for the stand-in 'adacorrection', not 'reuse'"):
        enable_cache(
            sampler.transformer, replace(config, correction=None), scheduler=sampler.scheduler
        )
    with pytest.raises(ValueError, match=f"searched for {STEPS} steps, this run has 15"):
        run_cached(sampler, config, steps=15)
    with pytest.raises(ValueError, match="scheduler must be given for a stored schedule"):
        run_cached(sampler, replace(config, num_steps=STEPS), bare=True)
    other = FluxSampler(sampler.transformer, FlowMatchEulerDiscreteScheduler(shift=4.0))
    with pytest.raises(ValueError, match="searched for other noise levels"):
        run_cached(other, config)
    other = Loop(SCHEDULERS["dpm-2-flow"](), sampler.transformer)
    enable_cache(other.transformer, config, scheduler=other.scheduler)
    with pytest.raises(ValueError, match="another sampler: .*class 'FlowMatchEulerDiscreteSched"):
        other.run(STEPS)


def test_options_of_the_sampler_matter(tmp_path, sampler):
    described = describe_sampler(DPMSolverMultistepScheduler(solver_order=3))
    assert (described["class"], described["solver_order"]) == ("DPMSolverMultistepScheduler", 3)
    config = stored_for(sampler, tmp_path / "s.json", sampler={**described, "solver_order": 2})
    loop = Loop(DPMSolverMultistepScheduler(solver_order=3), sampler.transformer)
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    with pytest.raises(ValueError, match="another sampler: solver_order 2, not 3$"):
        loop.run(STEPS)


@pytest.mark.parametrize("text", ["junk", "{}", '{"method": "Tea", "fingerprint": 1}'])
def test_files_that_are_none_are_rejected(tmp_path, transformer, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match="is not a stored schedule"):
        load_schedule(transformer, str(tmp_path / "s.json"), "reuse")


def test_interpolation_places_a_stored_schedule_by_noise_level(tmp_path, sampler):
    config = replace(stored_for(sampler, tmp_path / "s.json"), interpolate=True)
    assert computed(run_cached(sampler, config)[1]) == list(LISTED), "its own steps stay"
    _, summary = run_cached(sampler, config, steps=2 * STEPS)
    doubled = computed(summary)
    assert len(doubled) == 2 * len(LISTED) and doubled[0] == 0
    levels = [call.sigma for call in summary.trace.calls]
    sampler.scheduler.set_timesteps(STEPS)
    own_last = float(sampler.scheduler.sigmas[LISTED[-1]])
    nearest = min(range(2 * STEPS), key=lambda i: abs(levels[i] - own_last))
    assert doubled[-1] == nearest
