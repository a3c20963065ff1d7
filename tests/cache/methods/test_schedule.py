"""Schedule: exactly the given steps are computed; stored ones are bound to their run."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tests.samplers import SCHEDULERS, Loop, damped_further, linear_loop, relative_error
from tests.test_synchronisation import host_reads, reads_per_call  # noqa: F401 (a fixture)
from tests.tiny import FluxSampler, all_blocks, embed, euler, head, make_tiny_flux, run_blocks
from tests.tiny_families import FAMILIES, cached
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.forecast import line_weights
from xfuser_adacorr.core.refreshes import (
    checked_schedule,
    evenly_spaced,
    interpolated_steps,
    majority_steps,
    ranked_steps,
    refreshed_steps,
)
from xfuser_adacorr.model_executor.cache.samplers import describe_sampler, log_snrs, read_schedule
from xfuser_adacorr.model_executor.cache.stored_schedule import (
    StoredSchedule,
    load_schedule,
    save_schedule,
)

STEPS = 12
LISTED = (0, 1, 4, 5, 9)
STAND_INS = {
    "reuse": {},
    "forecast": {"stand_in": "forecast"},
    "adacorrection": {"enable_adacorrection": True},
    "literal": {"enable_adacorrection": True, "adacorr_mode": "literal"},
}
each_stand_in = pytest.mark.parametrize("stand_in", STAND_INS)


def scheduled(schedule, stand_in="reuse", **options):
    return CacheConfig(
        use_cache="Schedule", schedule=schedule, **{**STAND_INS[stand_in], **options}
    )


def run_cached(sampler, config, *, bare=False, steps=STEPS, **kwargs):
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    x = sampler.run(steps, **kwargs)
    summary = cache_summary(sampler.transformer)
    disable_cache(sampler.transformer)
    return x, summary


def computed(summary, branch="cond"):
    calls = summary.trace.calls
    return [call.step_index for call in calls if call.refreshed and call.context == branch]


# -- the set of steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 7, 20, 28])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_every_nth_step_is_foras_set(interval, num_steps):
    """FORA counts the steps down to 0: the first, and those whose countdown is divisible by N."""
    countdown = range(num_steps - 1, -1, -1)
    fora = {i for i, left in enumerate(countdown) if i == 0 or left % interval == 0}
    assert refreshed_steps(checked_schedule(interval), num_steps) == fora


def test_lists_and_masks_name_the_same_steps():
    mask = [step in LISTED for step in range(STEPS)]
    for given in (LISTED, LISTED[1:], list(reversed(LISTED)), mask):
        assert refreshed_steps(checked_schedule(given), STEPS) == set(LISTED)
    assert refreshed_steps(checked_schedule([]), STEPS) == {0}


@pytest.mark.parametrize("bare", [False, True])
@each_stand_in
def test_exactly_the_listed_steps_are_computed(stand_in, bare):
    sampler = FluxSampler(make_tiny_flux())
    config = scheduled(LISTED, stand_in, num_steps=STEPS)
    x, summary = run_cached(sampler, config, bare=bare)
    assert computed(summary) == list(LISTED)
    if stand_in != "literal":
        assert summary.compute_fraction == pytest.approx(len(LISTED) / STEPS)
    assert x.isfinite().all() and not torch.equal(x, sampler.run(STEPS))


@each_stand_in
def test_all_steps_listed_is_bit_equal(stand_in):
    sampler = FluxSampler(make_tiny_flux())
    plain = sampler.run(STEPS)
    assert torch.equal(run_cached(sampler, scheduled(1, stand_in))[0], plain)


def test_reuse_adds_the_last_residual_of_the_stack(sampler):
    model, kept = sampler.transformer, {}

    def velocity(inputs, index, last):
        hidden, encoder, shared = embed(model, inputs)
        if index in LISTED:
            kept["residual"] = run_blocks(all_blocks(model), hidden, encoder, shared)[0] - hidden
        return head(model, hidden + kept["residual"], shared)

    expected = euler(sampler, velocity, STEPS)
    x, _ = run_cached(sampler, scheduled(LISTED))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_forecast_is_the_damped_line_through_the_last_two_outputs(sampler):
    model, known, dampings = sampler.transformer, [], [1.0]

    def velocity(inputs, index, last):
        sigma = sampler.scheduler.sigmas[index].item()
        if index in LISTED:
            output = model(**inputs, return_dict=False)[0]
            if len(known) > 1:
                dampings.append(damped_further(dampings[-1], (sigma, output), *known))
            known[:] = [(sigma, output), *known[:1]]
            return output
        sigma1 = known[1][0] if len(known) > 1 else None
        a0, a1 = line_weights(sigma, known[0][0], sigma1, dampings[-1])
        return a0 * known[0][1] + (a1 * known[1][1] if len(known) > 1 else 0.0)

    expected = euler(sampler, velocity, STEPS)
    x, _ = run_cached(sampler, scheduled(LISTED, "forecast"))
    assert min(dampings) < 0.9  # otherwise the test would not see it
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2", "ddim"])
def test_compensation_at_the_listed_steps_is_exact_for_linear_outputs(name):
    """Steps after the last refresh stay as forecast, which is right for a line too."""
    loop, steps = linear_loop(name), [0, 3, 5, 9]
    plain = loop.run(STEPS)
    enable_cache(loop.transformer, scheduled(steps, "adacorrection"), scheduler=loop.scheduler)
    assert relative_error(loop.run(STEPS), plain) < 5e-5
    assert computed(cache_summary(loop.transformer)) == steps
    disable_cache(loop.transformer)
    enable_cache(loop.transformer, scheduled(steps, "forecast"), scheduler=loop.scheduler)
    assert relative_error(loop.run(STEPS), plain) > 1e-4


@each_stand_in
def test_branches_follow_the_same_schedule(stand_in):
    sampler = FluxSampler(make_tiny_flux())
    _, summary = run_cached(sampler, scheduled(LISTED, stand_in), guidance=2.0)
    assert computed(summary, "cond") == computed(summary, "uncond") == list(LISTED)


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("stand_in", ["reuse", "forecast", "adacorrection"])
def test_every_family_computes_the_listed_steps(tiny, stand_in):
    sampler = cached(tiny, scheduled([0, 1, 3], stand_in))
    x = sampler.run(5)
    refreshed = [call.refreshed for call in cache_summary(sampler.model).trace.calls]
    assert refreshed == [True, True, False, True, False] and x.isfinite().all()


@pytest.mark.parametrize("stand_in", ["reuse", "forecast", "adacorrection"])
def test_nothing_is_read_from_the_device(host_reads, stand_in):  # noqa: F811
    sampler = FluxSampler(make_tiny_flux())
    plain = reads_per_call(sampler, host_reads)
    enable_cache(sampler.transformer, scheduled(3, stand_in), scheduler=sampler.scheduler)
    reads_per_call(sampler, host_reads)  # counts FLOPs on the way
    counts = reads_per_call(sampler, host_reads)
    assert counts[1:] == plain[1:]
    assert counts[0] - plain[0] <= 1  # the schedule of the new run


# -- what bad input is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 0}, ValueError, "schedule must be a whole number N of at least 1"),
        ({"schedule": True}, TypeError, "schedule must be a whole number"),
        ({"schedule": "even"}, TypeError, "got 'even'"),
        ({"schedule": 2.5}, TypeError, "got 2.5"),
        ({"schedule": [0, 2.0]}, TypeError, "got the entry 2.0"),
        ({"schedule": [0, True]}, TypeError, "got the entry True"),
        ({"schedule": [-1]}, ValueError, "got the step -1"),
        ({"schedule": [3, 3]}, ValueError, "each step may be listed once"),
        ({"schedule": 3, "calibration": "x"}, ValueError, "calibration is for a stored schedule"),
        ({"schedule": 3, "schedule_interpolation": True}, ValueError, "is for a stored schedule"),
        ({"stand_in": "guess"}, ValueError, "stand_in must be one of reuse, forecast"),
        ({"stand_in": "forecast", "enable_adacorrection": True}, ValueError, "stand_in must be N"),
        ({"warmup_steps": 2}, ValueError, "list the steps in the schedule"),
        ({"rel_l1_thresh": 0.1}, ValueError, "rel_l1_thresh must be left at None for Schedule"),
        ({"adacorr_tolerance": 0.1}, ValueError, "adacorr_tolerance must be left at None"),
        ({"use_cache": "Fb", "schedule": 3}, ValueError, "schedule is an option of Schedule"),
        ({"use_cache": "Auto", "stand_in": "reuse"}, ValueError, "stand_in is an option of Sch"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**{"use_cache": "Schedule", **options})


def test_configuration_survives_a_round_trip_and_is_hashable():
    config = CacheConfig(use_cache="Schedule", schedule=[4, 0], stand_in="forecast")
    assert config.schedule == (0, 4)
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(CacheConfig(**{**config.to_dict(), "schedule": [0, 4]}))
    assert CacheConfig.from_name("Schedule+AdaCorrection").name == "Schedule+AdaCorrection"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([0, STEPS], f"step {STEPS} is beyond the run, which has steps 0 to {STEPS - 1}"),
        ([True] * 5, f"the mask has 5 entries, the run has {STEPS} steps"),
    ],
)
def test_schedule_that_does_not_fit_the_run_is_refused(sampler, schedule, message):
    enable_cache(sampler.transformer, scheduled(schedule), scheduler=sampler.scheduler)
    with pytest.raises(ValueError, match=message):
        sampler.run(STEPS)
    disable_cache(sampler.transformer)
    with pytest.raises(ValueError, match=message):
        enable_cache(sampler.transformer, scheduled(schedule, num_steps=STEPS))


def test_unknown_number_of_steps_is_refused(sampler):
    enable_cache(sampler.transformer, scheduled(3))
    with pytest.raises(ValueError, match="num_steps must be given for Schedule"):
        sampler.run(STEPS)


# -- stored schedules ------------------------------------------------------------------------------


def stored_for(looped, path, **changes):
    looped.scheduler.set_timesteps(STEPS)
    stored = StoredSchedule(
        refreshed=LISTED,
        stand_in="adacorrection",
        sampler=describe_sampler(looped.scheduler),
        levels=tuple(read_schedule(looped.scheduler).coordinates),
        score_db=50.0,
    )
    save_schedule(path, replace(stored, **changes), looped.transformer, {"seed": 0})
    return CacheConfig(use_cache="Schedule", enable_adacorrection=True, calibration=str(path))


def test_stored_schedule_is_used_beside_the_model(tmp_path, sampler):
    config = replace(stored_for(sampler, tmp_path / "schedule.json"), calibration=None)
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
        enable_cache(sampler.transformer, replace(config, enable_adacorrection=False))
    with pytest.raises(ValueError, match=f"searched for {STEPS} steps, this run has 15"):
        run_cached(sampler, config, steps=15)
    disable_cache(sampler.transformer)
    with pytest.raises(ValueError, match="scheduler must be given for a stored schedule"):
        run_cached(sampler, replace(config, num_steps=STEPS), bare=True)
    disable_cache(sampler.transformer)
    other = FluxSampler(sampler.transformer, FlowMatchEulerDiscreteScheduler(shift=4.0))
    with pytest.raises(ValueError, match="searched for other noise levels"):
        run_cached(other, config)
    disable_cache(sampler.transformer)
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
    config = replace(stored_for(sampler, tmp_path / "s.json"), schedule_interpolation=True)
    assert computed(run_cached(sampler, config)[1]) == list(LISTED), "its own steps stay"
    _, summary = run_cached(sampler, config, steps=2 * STEPS)
    doubled = computed(summary)
    assert len(doubled) == 2 * len(LISTED) and doubled[0] == 0
    levels = [call.sigma for call in summary.trace.calls]
    sampler.scheduler.set_timesteps(STEPS)
    own_last = float(sampler.scheduler.sigmas[LISTED[-1]])
    nearest = min(range(2 * STEPS), key=lambda i: abs(levels[i] - own_last))
    assert doubled[-1] == nearest


def test_interpolated_steps_by_hand():
    own = [1.0, 0.75, 0.5, 0.25]
    eighths = [1.0 - i / 8 for i in range(8)]
    # 0 and 2 of 4: levels 1 and 0.5; 4 of 8 at 1, 5/6, 2/3, 1/2, nearest 1, 7/8, 5/8, 4/8
    assert interpolated_steps([0, 2], own, eighths) == (0, 1, 3, 4)
    assert interpolated_steps([0], own, eighths) == (0, 1)
    assert interpolated_steps([0, 1, 2, 3], own, [1.0, 0.5]) == (0, 1)


def test_even_spacing_on_an_axis():
    assert evenly_spaced([float(i) for i in range(13)], 4) == (0, 4, 8, 12)
    assert evenly_spaced([0.0, 1.0, 2.0, 10.0], 3) == (0, 2, 3)
    assert evenly_spaced([1.0, 0.5], 1) == (0,)


def test_log_snr_of_flow_and_of_variance_preserving_schedules():
    flow = SCHEDULERS["flow-euler"]()
    flow.set_timesteps(8)
    x = flow.sigmas[1:-1].double()
    torch.testing.assert_close(
        torch.tensor(log_snrs(flow)[1:]).double(), 2 * torch.log((1 - x) / x), rtol=1e-4, atol=1e-4
    )
    ddim = SCHEDULERS["ddim"]()
    ddim.set_timesteps(8)
    alphas = ddim.alphas_cumprod[ddim.timesteps].double()
    torch.testing.assert_close(
        torch.tensor(log_snrs(ddim)[1:]).double(),
        torch.log(alphas / (1 - alphas))[1:],
        rtol=1e-4,
        atol=1e-4,
    )
    for scheduler in (flow, ddim):
        logs = log_snrs(scheduler)
        assert logs == sorted(logs)


# -- averages over runs ----------------------------------------------------------------------------


def test_majority_and_ranking_of_steps():
    shares = [1.0, 0.2, 0.6, 0.5, 0.0, 0.9]
    assert majority_steps(shares) == (0, 2, 5)
    assert ranked_steps(shares, 3) == (0, 2, 5)
    assert ranked_steps(shares, 4) == (0, 2, 3, 5)
    # of equals the one farthest from those chosen
    assert ranked_steps([1.0, 0.5, 0.5, 0.5, 0.5], 2) == (0, 4)
    assert ranked_steps([1.0, 0.5, 0.5, 0.5, 0.5], 3) == (0, 2, 4)
