"""A compute budget is spent exactly, where it serves most."""

import math
from itertools import pairwise

import pytest
import torch

from tests.cached import computed, run_cached
from tests.samplers import SCHEDULERS, Loop
from tests.tiny import FluxSampler, make_tiny_flux
from tests.tiny_families import FAMILIES, cached
from xfuser_adacorr import Auto, CacheConfig, cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.adacorrection.budget import (
    Budget,
    Budgeted,
    budget_tolerance,
    rate,
    refreshes_left,
)
from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule
from xfuser_adacorr.model_executor.cache.methods.base import Call, Decision, Read, Rule
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import CallRecord

STEPS = 20
FRACTIONS = (0.15, 0.25, 0.4, 0.5, 0.8, 1.0)


def auto(**options):
    return CacheConfig(use_cache="Auto", **options)


def nearest_steps(fraction, steps):
    return max(math.floor(fraction * steps + 0.5), 1)


# -- the maths -------------------------------------------------------------------------------------


def test_budget_in_whole_refreshes():
    assert refreshes_left(0.4, 28, 0.0, 28, 0.0) == 11  # 11.2
    assert refreshes_left(0.4, 28, 11.0, 5, 0.0) == 0
    assert refreshes_left(0.9, 10, 2.0, 3, 0.0) == 3  # no more than there are steps
    # 10 steps, 6 wanted, 1 + 2 * 0.1 spent: 7 left of which n are full and 7 - n cost 0.1
    assert refreshes_left(0.6, 10, 1.2, 7, 0.1) == round((6 - 1.2 - 0.7) / 0.9)
    assert refreshes_left(0.5, 10, 3.0, 4, 1.0) == 4


def test_tolerance_spends_what_it_is_for():
    """With equal rates s a gap of g steps adds up to (s g)^2 / 2; the last gap is a third of it."""
    s, gap, refreshes = 0.3, 6, 12
    ahead = s * (refreshes * gap + gap / 3)
    assert budget_tolerance(ahead, refreshes) == pytest.approx((s * gap) ** 2 / 2)


class Always(Rule):
    """A rule with one decision."""

    def __init__(self, decision):
        self.decision = decision

    def decide(self, call, read):
        return self.decision


@pytest.mark.parametrize(
    ("own", "spent", "remaining", "outcome"),
    [
        (Decision(True, "first"), 9.0, 5, (True, "first")),  # nothing could stand in
        (Decision(False, "reuse"), 0.0, 4, (True, "budget")),  # just enough for all steps left
        (Decision(True, "offset"), 4.0, 6, (False, "reuse")),  # used up
        (Decision(True, "offset"), 1.0, 6, (True, "offset")),
        (Decision(False, "reuse"), 1.0, 6, (False, "reuse")),
        (Decision(True, "base", weight=0.49), 1.0, 6, (False, "reuse")),  # half the weight at least
        (Decision(True, "base", weight=0.5), 1.0, 6, (True, "base")),
        (Decision(True, "base"), 1.0, 6, (True, "base")),
        (Decision(True, "last"), 4.0, 1, (False, "reuse")),
    ],
)
def test_a_budget_overrides_a_rule(own, spent, remaining, outcome):
    """Of 10 steps 4 may be computed."""
    budget = Budget(0.4, None)
    budget.steps, budget.spent = 10, spent
    step = Step(10 - remaining, 0.5, 0.4, remaining)
    decision = Budgeted(Always(own), budget).decide(Call(step=step), Read())
    assert (decision.compute, decision.why) == outcome


# -- steering along synthetic errors ---------------------------------------------------------------


def drive(fraction, error_per_drift, steps=50, shift=1.0):
    """Decide a run whose errors grow as ``error_per_drift(sigma)`` says; the refreshed steps.

    The drift since a refresh is the distance in sigma, the speed 1.
    """
    even = [1.0 - i / steps for i in range(steps + 1)]
    sigmas = [shift * s / (1.0 + (shift - 1.0) * s) for s in even]
    places = [Step(i, sigmas[i], sigmas[i + 1], steps - i) for i in range(steps)]
    rule = ErrorRule(1.0, 0.0, 0.01, Budget(fraction, places))
    budgeted, refreshed, latents = Budgeted(rule, rule.budget), [], torch.ones(1, 1, 1)
    for step in places:
        call, read, drift = Call(latents=latents, step=step), Read(), None
        if refreshed:
            drift = abs(step.sigma - sigmas[refreshed[-1]])
            found = [float(x) for x in budgeted.measure(call).outside[4:]]
            read = Read(outside=[drift**2, 1.0, 1.0, 1.0, *found])
        decision = budgeted.decide(call, read)
        assert decision.tolerance is None or decision.tolerance >= 0.0
        call.cost = float(decision.compute)
        budgeted.after_call(call, decision)
        if decision.compute:
            miss = math.nan if drift is None else (error_per_drift(step.sigma) * drift) ** 2
            record = CallRecord("step", step.index, step.sigma, True, decision.why)
            missed = [torch.tensor(miss, dtype=torch.float64), torch.tensor(1.0).double()]
            budgeted.computed(call, decision, missed, record)
            refreshed.append(step.index)
    return refreshed


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
    refreshed = drive(fraction, DRIFTS[drift], steps, shift)
    assert len(refreshed) == nearest_steps(fraction, steps)
    if fraction <= 0.5 and shift == 1.0:
        gaps = [b - a for a, b in pairwise(refreshed)]
        assert max(gaps[-3:]) <= 5.0 / fraction, "starved at the end"
        assert gaps[-5:] != [1] * 5, "refreshes left over for the end"


def test_expected_rates_are_spent_evenly():
    """Errors as `RATES` has them: every gap adds up to the same rate, the last one to a third.

    A gap ends with the first step beyond its share, so it may be longer by the rate of one step.
    """
    steps, fraction = 200, 0.1
    refreshed = drive(fraction, lambda sigma: rate(Step(0, sigma, sigma, 1)) ** 2, steps)
    rates = [rate(Step(0, 1.0 - i / steps, 0.0, 1)) for i in range(steps)]
    gaps = [sum(rates[a:b]) for a, b in pairwise(refreshed)][2:]
    longest_step = max(rates)
    assert max(gaps) - min(gaps) <= 2 * longest_step
    assert sum(rates[refreshed[-1] :]) < 0.5 * min(gaps), "less than the others"


def test_gaps_shorten_where_more_error_is_found():
    even = drive(0.24, DRIFTS["constant"])
    burst = drive(0.24, lambda sigma: 5.0 if 0.3 < sigma < 0.6 else 0.1)
    found = next(rank for rank, step in enumerate(burst) if 20 < step < 35)
    assert burst[: found + 1] == even[: found + 1]  # until the first refresh inside
    assert burst[found + 1] < even[found + 1] and burst[found + 2] < even[found + 2]
    assert len(burst) == len(even)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("bare", [False, True])
def test_auto_holds_the_compute_exactly(fraction, bare):
    sampler = FluxSampler(make_tiny_flux())
    _, summary = run_cached(sampler, auto(target_compute=fraction, num_steps=STEPS), bare=bare)
    least = 3 if bare else 1  # the last two are computed where the end is only counted
    assert summary.computed_steps == max(nearest_steps(fraction, STEPS), least)


def test_speedup_is_the_inverse_of_counted_compute(sampler):
    x, summary = run_cached(sampler, auto(target_speedup=2.5))
    assert summary.compute_fraction == pytest.approx(1 / 2.5)
    assert torch.equal(run_cached(sampler, auto(target_compute=0.4))[0], x)


def test_full_budget_is_bit_equal(sampler):
    plain = sampler.run(STEPS)
    assert torch.equal(run_cached(sampler, auto(target_compute=1.0))[0], plain)


@pytest.mark.parametrize(
    ("use_cache", "threshold", "fraction", "bare"),
    [  # each with each other one
        (use_cache, threshold, (0.4, 0.6)[(i + j) % 2], bool((i // 2 + j) % 2))
        for i, use_cache in enumerate(["Fb", "Tea", "Fast", "Ada"])
        for j, threshold in enumerate([0.0, 0.2, 10.0])
    ],
)
def test_corrected_methods_hold_it_whatever_they_ask_for(use_cache, threshold, fraction, bare):
    """Reused calls of Fb compute its first block, which counts."""
    sampler = FluxSampler(make_tiny_flux())
    config = CacheConfig(
        use_cache=use_cache,
        rel_l1_thresh=threshold,
        enable_adacorrection=True,
        target_compute=fraction,
        num_steps=STEPS,
        **({"codebook": {0.1: 3, 9.0: 2}} if use_cache == "Ada" else {}),
    )
    _, summary = run_cached(sampler, config, bare=bare)
    assert summary.compute_fraction == pytest.approx(fraction, abs=0.5 / STEPS + 1e-6)


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2", "ddim-v"])
def test_branches_of_a_step_are_decided_together(name):
    loop = Loop(SCHEDULERS[name]())
    called, forward = [], loop.transformer.forward
    loop.transformer.forward = lambda **kw: called.append(1) or forward(**kw)
    enable_cache(loop.transformer, auto(target_compute=0.4), scheduler=loop.scheduler)
    loop.run(STEPS, guidance=3.0)
    summary = cache_summary(loop.transformer)
    assert len(computed(summary)) == 8
    assert [call.calls for call in summary.trace.calls] == [2] * STEPS
    assert (summary.calls, summary.computed_calls, len(called)) == (2 * STEPS, 16, 16)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_compute": 0.0}, ValueError, "target_compute must be finite and above 0"),
        ({"target_compute": 1.2}, ValueError, "target_compute must be .* at most 1, got 1.2"),
        ({"target_compute": "0.4"}, TypeError, "target_compute must be a number"),
        ({"target_speedup": 0.5}, ValueError, "target_speedup must be .*at least 1, got 0.5"),
        (
            {"target_compute": 0.4, "adacorr_tolerance": 0.01},
            ValueError,
            "adacorr_tolerance and target_compute: give one of them",
        ),
        (
            {"target_compute": 0.4, "target_speedup": 2},
            ValueError,
            "target_compute and target_speedup: give one of them",
        ),
        (
            {"use_cache": "Fb", "target_compute": 0.4},
            ValueError,
            r"target_compute is an option of Fb\+AdaCorrection, .*Auto.*, not of Fb$",
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
            "target_compute is an option of .*, not of Fb",
        ),
        (
            {"target_compute": 0.4, "adacorr_gamma": 0},
            ValueError,
            "adacorr_gamma must be above 0 with",
        ),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**options)


def test_unknown_number_of_steps_is_refused(transformer):
    with pytest.raises(ValueError, match="num_steps must be given for Auto on a model without"):
        enable_cache(transformer, Auto(target_compute=0.4))
    with pytest.raises(ValueError, match="num_steps must be given"):
        enable_cache(
            transformer,
            CacheConfig(use_cache="Fb", enable_adacorrection=True, target_compute=0.4),
        )
