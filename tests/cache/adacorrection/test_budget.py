"""Targets: a compute budget is spent exactly, an expected fidelity is kept, and what they need."""

import json
import math
from itertools import pairwise

import pytest
import torch

from tests.samplers import SCHEDULERS, Loop
from tests.tiny import FluxSampler, make_tiny_flux
from tests.tiny_families import FAMILIES, cached
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.targets import (
    PsnrRelation,
    budget_tolerance,
    fidelity_tolerance,
    refreshes_left,
)
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord
from xfuser_adacorr.model_executor.cache.correction.adacorrection import AdaCorrection
from xfuser_adacorr.model_executor.cache.correction.targets import (
    ComputeTarget,
    FidelityTarget,
    TargetCalibration,
)
from xfuser_adacorr.model_executor.cache.samplers import NoiseSchedule
from xfuser_adacorr.model_executor.cache.target_calibration import save_target_calibration

STEPS = 20
FRACTIONS = (0.15, 0.25, 0.4, 0.5, 0.8, 1.0)


def run_cached(sampler, config, *, bare=False, steps=STEPS, **kwargs):
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    x = sampler.run(steps, **kwargs)
    summary = cache_summary(sampler.transformer)
    disable_cache(sampler.transformer)
    return x, summary


def auto(**options):
    return CacheConfig(use_cache="Auto", **options)


def nearest_calls(fraction, calls):
    return max(math.floor(fraction * calls + 0.5), 1)


# -- the maths -------------------------------------------------------------------------------------


def test_budget_in_whole_refreshes():
    assert refreshes_left(0.4, 28, 0.0, 28, 0.0) == 11  # 11.2
    assert refreshes_left(0.4, 28, 11.0, 5, 0.0) == 0
    assert refreshes_left(0.9, 10, 2.0, 3, 0.0) == 3  # no more than there are calls
    # 10 calls, 6 wanted, 1 + 2 * 0.1 spent: 7 left of which n are full and 7 - n cost 0.1
    assert refreshes_left(0.6, 10, 1.2, 7, 0.1) == round((6 - 1.2 - 0.7) / 0.9)
    assert refreshes_left(0.5, 10, 3.0, 4, 1.0) == 4


def test_tolerances_spend_what_they_are_for():
    """With equal rates s a gap of g steps adds up to (s g)^2 / 2; the last gap is a third of it."""
    s, gap, refreshes = 0.3, 6, 12
    ahead = s * (refreshes * gap + gap / 3)
    assert budget_tolerance(ahead, refreshes) == pytest.approx((s * gap) ** 2 / 2)
    tau = fidelity_tolerance(s * gap * refreshes, refreshes * (s * gap) ** 2 / 2)
    assert tau == pytest.approx((s * gap) ** 2 / 2)
    assert fidelity_tolerance(1.0, -0.1) == 0.0


def test_profile_is_linear_between_its_points():
    profile = Profile(((0.2, 1.0), (0.6, 3.0)))
    assert [profile(x) for x in (0.0, 0.2, 0.3, 0.6, 2.0)] == pytest.approx([1, 1, 1.5, 3, 3])
    assert Profile()(0.7) == 1.0
    for points in ((), ((0.5, 1.0), (0.5, 2.0)), ((0.5, 0.0),)):
        with pytest.raises(ValueError, match="profile"):
            Profile(points)


def test_relation_to_psnr_is_fitted_and_inverted():
    relation = PsnrRelation(25.0, 21.0)
    points = [(error, relation.psnr_db(error)) for error in (0.001, 0.02, 0.1)]
    fitted = PsnrRelation.fitted(points)
    assert (fitted.at_one, fitted.slope) == pytest.approx((25.0, 21.0))
    assert relation.psnr_db(relation.error(40.0)) == pytest.approx(40.0)
    assert relation.psnr_db(0.0) == math.inf
    with pytest.raises(ValueError, match="at least two different"):
        PsnrRelation.fitted([(0.1, 40.0), (0.1, 41.0)])
    with pytest.raises(ValueError, match="slope above 0"):
        PsnrRelation.fitted([(0.1, 40.0), (0.2, 41.0)])


# -- steering along synthetic errors ---------------------------------------------------------------


class SyntheticClock:
    def __init__(self, sigmas):
        steps = [abs(b - a) for a, b in pairwise(sigmas)]
        self.schedule = NoiseSchedule(sigmas, sigmas[:-1], steps, [(1.0, 0.0)] * len(steps), None)


def drive(make_target, error_per_drift, steps=50, shift=1.0):
    """Decide a run whose errors grow as ``error_per_drift(sigma)`` says, as the engine does."""
    even = [1.0 - i / steps for i in range(steps + 1)]
    sigmas = [shift * s / (1.0 + (shift - 1.0) * s) for s in even]
    target = make_target(SyntheticClock(sigmas))
    correction = AdaCorrection(gamma=1.0, lambda_=0.0, tolerance=0.01, target=target)
    history, refreshed, last = correction.new_state(), [], None
    for i in range(steps):
        step = Step(i, sigmas[i], sigmas[i + 1], steps - i)
        score = None
        if last is not None:
            drift = abs(sigmas[i] - sigmas[last])
            score = correction.score(history, [drift**2, 1.0, 1.0, 1.0], step)
            assert score.tolerance >= 0.0
        forced_last = correction.forced_last(step, score)
        ruling = correction.ruling(history, step, forced_last)
        forced = last is None or step.remaining <= forced_last
        reuse = not forced and (ruling == "reuse" or (ruling is None and score.weight < 1.0))
        record = CallRecord("cond", i, sigmas[i], not reuse, "reuse" if reuse else "offset")
        record.compute_fraction = float(not reuse)
        tensor = torch.ones(1, 2, 2)
        if reuse:
            correction.reuse(history, tensor, step, score, torch.float32)
        else:
            correction.refresh(history, tensor, tensor, tensor, step, score, record)
            history.velocity_to_latents = 1.0
            if last is not None:
                history.kappa = error_per_drift(sigmas[i])
                target.found(history.pace, step, last, history.kappa, 1.0)
            history.unread_line = None
            refreshed.append(i)
            last = i
        correction.answered(history, step, record)
    return refreshed, history


DRIFTS = {
    "constant": lambda sigma: 0.5,
    "early": lambda sigma: 0.02 + sigma**4,
    "late": lambda sigma: 0.02 + (1.0 - sigma) ** 4,
    "burst": lambda sigma: 5.0 if 0.4 < sigma < 0.5 else 0.1,
    "growing a thousandfold": lambda sigma: 0.01 * 1000.0 ** (1.0 - sigma),
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize(("steps", "shift"), [(50, 1.0), (28, 3.0)])
def test_budget_is_held_on_every_drift(drift, fraction, steps, shift):
    refreshed, _ = drive(
        lambda clock: ComputeTarget(fraction, Profile(), clock), DRIFTS[drift], steps, shift
    )
    assert len(refreshed) == nearest_calls(fraction, steps)
    if fraction <= 0.5 and shift == 1.0:
        gaps = [b - a for a, b in pairwise(refreshed)]
        assert max(gaps[-3:]) <= 5.0 / fraction, "starved at the end"
        assert gaps[-5:] != [1] * 5, "refreshes left over for the end"


def test_equal_rates_are_spent_evenly():
    refreshed, _ = drive(lambda c: ComputeTarget(0.2, Profile(), c), DRIFTS["constant"])
    assert {b - a for a, b in pairwise(refreshed[2:])} <= {5, 6}
    assert 50 - refreshed[-1] in (2, 3), "less than the others"


def test_refreshes_go_where_errors_are():
    """A known profile is followed; an unknown one is felt where it is measured."""
    rates = tuple((x / 20, math.sqrt(DRIFTS["early"](x / 20))) for x in range(21))
    known, _ = drive(lambda c: ComputeTarget(0.24, Profile(rates), c), DRIFTS["early"])
    flat, _ = drive(lambda c: ComputeTarget(0.24, Profile(), c), DRIFTS["early"])
    assert len(known) == len(flat) == 12
    assert sum(i < 25 for i in known) >= 8


def test_gaps_shorten_where_more_error_is_found():
    even, _ = drive(lambda c: ComputeTarget(0.24, Profile(), c), DRIFTS["constant"])
    burst, _ = drive(
        lambda c: ComputeTarget(0.24, Profile(), c),
        lambda sigma: 5.0 if 0.3 < sigma < 0.6 else 0.1,
    )
    found = next(rank for rank, step in enumerate(burst) if 20 < step < 35)
    assert burst[: found + 1] == even[: found + 1]  # until the first refresh inside
    assert burst[found + 1] < even[found + 1] and burst[found + 2] < even[found + 2]
    assert len(burst) == len(even)


@pytest.mark.parametrize("drift", ["constant", "late", "burst"])
@pytest.mark.parametrize("allowed", [0.02, 0.1, 0.4])
def test_expected_error_stays_within_what_is_allowed(drift, allowed):
    refreshed, history = drive(
        lambda clock: FidelityTarget(allowed, Profile(), clock), DRIFTS[drift]
    )
    error = history.pace.error + history.accumulated_error
    assert error <= 1.15 * allowed
    assert 1 < len(refreshed) < 50
    if drift == "constant":
        assert error >= 0.5 * allowed, "no more is spent than has to be"


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("bare", [False, True])
def test_auto_holds_the_compute_exactly(fraction, bare):
    sampler = FluxSampler(make_tiny_flux())
    _, summary = run_cached(sampler, auto(target_compute=fraction, num_steps=STEPS), bare=bare)
    least = 3 if bare else 1  # the last two are computed where the end is only counted
    assert summary.computed_steps == max(nearest_calls(fraction, STEPS), least)
    assert summary.expected_psnr_db is None


def test_speedup_is_the_inverse_of_counted_compute(sampler):
    x, summary = run_cached(sampler, auto(target_speedup=2.5))
    assert summary.compute_fraction == pytest.approx(1 / 2.5)
    assert torch.equal(run_cached(sampler, auto(target_compute=0.4))[0], x)


def test_full_budget_is_bit_equal(sampler):
    plain = sampler.run(STEPS)
    assert torch.equal(run_cached(sampler, auto(target_compute=1.0))[0], plain)


@pytest.mark.parametrize("use_cache", ["Fb", "Tea", "Fast", "Ada"])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 10.0])
@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_corrected_methods_hold_it_whatever_they_ask_for(use_cache, threshold, fraction):
    """Reused calls of Fb compute its first block, which counts."""
    sampler = FluxSampler(make_tiny_flux())
    config = CacheConfig(
        use_cache=use_cache,
        rel_l1_thresh=threshold,
        enable_adacorrection=True,
        target_compute=fraction,
    )
    _, summary = run_cached(sampler, config)
    assert summary.compute_fraction == pytest.approx(fraction, abs=0.5 / STEPS + 1e-6)


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2", "ddim-v"])
def test_branches_of_a_step_are_decided_together(name):
    loop = Loop(SCHEDULERS[name]())
    enable_cache(loop.transformer, auto(target_compute=0.4), scheduler=loop.scheduler)
    loop.run(STEPS, guidance=3.0)
    calls = cache_summary(loop.transformer).trace.calls
    refreshed = {
        branch: [c.step_index for c in calls if c.refreshed and c.context == branch]
        for branch in ("cond", "uncond")
    }
    assert refreshed["cond"] == refreshed["uncond"]
    assert len(refreshed["cond"]) == 8


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_every_family_holds_the_compute(tiny):
    sampler = cached(tiny, auto(target_compute=0.5))
    sampler.run(10)
    assert cache_summary(sampler.model).computed_steps == 5


def test_trace_shows_the_steered_tolerance(sampler):
    _, summary = run_cached(sampler, auto(target_compute=0.3))
    calls = summary.trace.calls[1:-1]
    assert all(call.tolerance > 0.0 for call in calls)
    assert len({call.tolerance for call in calls}) >= 4
    for call in calls:
        if call.reason == "offset":
            assert call.weight == 1.0 and call.expected_error > 0.0


def calibrated(sampler, tmp_path, relation):
    calibration = TargetCalibration(Profile(((0.0, 0.6), (1.0, 2.0))), relation)
    save_target_calibration(tmp_path / "targets.json", calibration, sampler.transformer, {})
    sampler.transformer.register_to_config(_name_or_path=str(tmp_path))


def test_psnr_target_spends_more_for_more_and_reports_what_it_expects(tmp_path, sampler):
    calibrated(sampler, tmp_path, PsnrRelation(25.0, 20.0))
    computed = []
    for target in (30.0, 45.0, 60.0, 200.0):
        _, summary = run_cached(sampler, auto(target_psnr=target))
        computed.append(summary.computed_steps)
        assert summary.expected_psnr_db >= target - 2.0
    assert computed == sorted(computed) and computed[0] < computed[-1] == STEPS


def test_expected_psnr_adds_up_what_the_trace_expects(tmp_path, sampler):
    relation = PsnrRelation(25.0, 20.0)
    calibrated(sampler, tmp_path, relation)
    _, summary = run_cached(sampler, auto(target_compute=0.3))
    calls = summary.trace.calls
    ends = [a for a, b in pairwise(calls) if b.refreshed and not a.refreshed]
    assert not calls[-1].refreshed  # its gap has no refresh after it
    total = sum(call.expected_error for call in [*ends, calls[-1]])
    assert summary.expected_psnr_db == pytest.approx(25.0 - 20.0 * math.log10(total))


def test_calibration_is_bound_to_its_model(tmp_path, sampler):
    with pytest.raises(ValueError, match="target_psnr needs a calibration of the model"):
        enable_cache(sampler.transformer, auto(target_psnr=40.0), scheduler=sampler.scheduler)
    calibrated(sampler, tmp_path, PsnrRelation(25.0, 20.0))
    other = make_tiny_flux(seed=1)
    other.register_to_config(_name_or_path=str(tmp_path))
    for options in ({"target_psnr": 40.0}, {"target_compute": 0.5}):
        with pytest.raises(ValueError, match="targets.json was made for another model"):
            enable_cache(other, auto(**options), scheduler=sampler.scheduler)
    enable_cache(other, "Auto", scheduler=sampler.scheduler)  # without a target nothing is read
    content = json.loads((tmp_path / "targets.json").read_text())
    (tmp_path / "targets.json").write_text(json.dumps({**content, "psnr": {"slope": 0.0}}))
    with pytest.raises(ValueError, match="is not a calibration of targets"):
        enable_cache(sampler.transformer, auto(target_psnr=40.0), scheduler=sampler.scheduler)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_compute": 0.0}, ValueError, r"target_compute must be in \(0, 1\], got 0.0"),
        ({"target_compute": 1.2}, ValueError, r"target_compute must be in \(0, 1\]"),
        ({"target_compute": "0.4"}, TypeError, "target_compute must be a number"),
        ({"target_speedup": 0.5}, ValueError, "target_speedup must be at least 1"),
        ({"target_psnr": 0}, ValueError, "target_psnr must be above 0 dB"),
        (
            {"target_compute": 0.4, "adacorr_tolerance": 0.01},
            ValueError,
            "target_compute and adacorr_tolerance: give one of them",
        ),
        (
            {"target_compute": 0.4, "target_psnr": 40},
            ValueError,
            "target_compute and target_psnr: give one of them",
        ),
        (
            {"use_cache": "Fb", "target_compute": 0.4},
            ValueError,
            "is an option of Auto and of methods with AdaCorrection in adaptive mode, not of Fb",
        ),
        (
            {"use_cache": "Schedule", "enable_adacorrection": True, "target_compute": 0.4},
            ValueError,
            "not of Schedule",
        ),
        (
            {"use_cache": "Fb", "enable_adacorrection": True, "adacorr_mode": "literal"}
            | {"target_compute": 0.4},
            ValueError,
            "in adaptive mode",
        ),
        ({"target_compute": 0.4, "adacorr_gamma": 0}, ValueError, "adacorr_gamma must be above 0"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**options)


def test_unknown_number_of_steps_is_refused(transformer):
    with pytest.raises(ValueError, match="num_steps must be given for target_compute"):
        enable_cache(transformer, auto(target_compute=0.4))
