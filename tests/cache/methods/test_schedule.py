"""Schedule: exactly the given steps are computed; stored ones are bound to their run."""

import pytest
import torch

from tests.cached import computed, reads_per_call
from tests.cached import run_cached as run_of
from tests.samplers import damped_further, linear_loop, relative_error
from tests.tiny import FluxSampler, all_blocks, embed, euler, head, make_tiny_flux, run_blocks
from tests.tiny_families import FAMILIES, cached
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache

STEPS = 12
LISTED = (0, 1, 4, 5, 9)
STAND_INS = {
    "reuse": {},
    "forecast": {"stand_in": "forecast"},
    "adacorrection": {"enable_adacorrection": True},
}
each_stand_in = pytest.mark.parametrize("stand_in", STAND_INS)


def scheduled(schedule, stand_in="reuse", **options):
    return CacheConfig(
        use_cache="Schedule", schedule=schedule, **{**STAND_INS[stand_in], **options}
    )


def run_cached(sampler, config, **kwargs):
    return run_of(sampler, config, **{"steps": STEPS, **kwargs})


# -- which steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
@each_stand_in
def test_exactly_the_listed_steps_are_computed(stand_in, bare):
    sampler = FluxSampler(make_tiny_flux())
    config = scheduled(LISTED, stand_in, num_steps=STEPS)
    x, summary = run_cached(sampler, config, bare=bare)
    assert computed(summary) == list(LISTED)
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
        r = dampings[-1] * (sigma - known[0][0]) / (known[0][0] - sigma1) if sigma1 else 0.0
        a0, a1 = 1.0 + r, -r
        return a0 * known[0][1] + (a1 * known[1][1] if len(known) > 1 else 0.0)

    expected = euler(sampler, velocity, STEPS)
    x, _ = run_cached(sampler, scheduled(LISTED, "forecast"))
    assert min(dampings) < 0.9  # otherwise the test would not see it
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2", "ddim"])
def test_repair_at_the_listed_steps_is_exact_for_linear_outputs(name):
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
    assert summary.calls == 2 * STEPS
    if stand_in in ("reuse",):
        assert computed(summary, "cond") == computed(summary, "uncond") == list(LISTED)
    else:
        assert computed(summary, "step") == list(LISTED)
        assert [call.calls for call in summary.trace.calls] == [2] * STEPS


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("stand_in", ["reuse", "forecast", "adacorrection"])
def test_every_family_computes_the_listed_steps(tiny, stand_in):
    sampler = cached(tiny, scheduled([0, 1, 3], stand_in))
    x = sampler.run(5)
    refreshed = [call.refreshed for call in cache_summary(sampler.model).trace.calls]
    assert refreshed == [True, True, False, True, False] and x.isfinite().all()


@pytest.mark.parametrize("stand_in", ["reuse", "forecast", "adacorrection"])
def test_nothing_is_read_from_the_device(host_reads, stand_in):
    sampler = FluxSampler(make_tiny_flux())
    plain = reads_per_call(sampler, host_reads)
    enable_cache(sampler.transformer, scheduled(3, stand_in), scheduler=sampler.scheduler)
    counts = reads_per_call(sampler, host_reads)
    assert counts[1:] == plain[1:]
    assert counts[0] - plain[0] <= 2  # timesteps and noise levels of the new run


# -- what bad input is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 0}, ValueError, "schedule must be a whole number of at least 1, got 0"),
        ({"schedule": True}, TypeError, "schedule must be a whole number"),
        ({"schedule": "even"}, TypeError, "got 'even'"),
        ({"schedule": 2.5}, TypeError, "got 2.5"),
        ({"schedule": [0, 2.0]}, TypeError, "got the entry 2.0"),
        ({"schedule": [0, True]}, TypeError, "got the entry True"),
        ({"schedule": [-1]}, ValueError, "got the step -1"),
        ({"schedule": [3, 3]}, ValueError, "each step may be listed once"),
        ({"schedule": 3, "calibration": "x"}, ValueError, "calibration is for a stored schedule"),
        ({"schedule": 3, "schedule_interpolation": True}, ValueError, "is for a stored schedule"),
        (
            {"stand_in": "guess"},
            ValueError,
            "stand_in must be one of reuse, last, forecast, got 'guess'",
        ),
        ({"stand_in": "forecast", "enable_adacorrection": True}, ValueError, "stand_in must be N"),
        ({"warmup_steps": 2}, ValueError, "warmup_steps is an option of .*, not of Schedule"),
        ({"rel_l1_thresh": 0.1}, ValueError, "rel_l1_thresh is an option of .*, not of Schedule"),
        ({"adacorr_tolerance": 0.1}, ValueError, "adacorr_tolerance is an option of .*not of Sch"),
        (
            {"enable_adacorrection": True, "adacorr_mode": "literal"},
            ValueError,
            "adacorr_mode must be 'adaptive' for Schedule",
        ),
        ({"use_cache": "Fb", "schedule": 3}, ValueError, "schedule is an option of Schedule"),
        ({"use_cache": "Auto", "stand_in": "reuse"}, ValueError, "stand_in is an option of Sch"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**{"use_cache": "Schedule", **options})


def test_lists_and_masks_are_kept_as_tuples():
    config = CacheConfig(use_cache="Schedule", schedule=[4, 0], stand_in="forecast")
    assert config.steps == (0, 4) and hash(config) == hash(scheduled((0, 4), "forecast"))
    assert scheduled([True, False]).steps == (True, False)


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
    with pytest.raises(ValueError, match="num_steps must be given for Schedule"):
        enable_cache(sampler.transformer, scheduled(3))
