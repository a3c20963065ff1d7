"""When AdaCorrection refreshes: its score, and what it makes of whole runs."""

import math

import pytest
import torch

from tests.cached import computed, run_cached
from tests.tiny import FluxSampler, LinearInSigma
from xfuser_adacorr import CacheConfig
from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule
from xfuser_adacorr.model_executor.cache.engine import decide
from xfuser_adacorr.model_executor.cache.forecasts import DampedLine
from xfuser_adacorr.model_executor.cache.methods.base import Call, Decision, Read
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.signals import token_std_sum
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import CallRecord

STEPS = 20
BASES = ["Fb", "Tea", "Fast"]


def config_of(use_cache, **options):
    if use_cache != "Auto":
        options = {"rel_l1_thresh": 0.3, **options}
    return CacheConfig(use_cache=use_cache, enable_adacorrection=True, **options)


# -- one decision ----------------------------------------------------------------------------------


def rule_after_a_refresh(gamma=1.0, lambda_=1.0, tolerance=0.01, *, at=0.9, kappa=None, error=0.0):
    """A rule that refreshed at step 0, as if it had found ``kappa`` there."""
    rule = ErrorRule(gamma, lambda_, tolerance)
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    step = Step(0, at, at - 0.1, 10)
    call = Call(latents=latents, step=step)
    decision = rule.decide(call, Read())
    assert (decision.compute, decision.why) == (True, "first")
    rule.computed(call, decision, [], CallRecord("step", 0, at, True, "first"))
    rule.kappa, rule.speed, rule.error = kappa, 1.0, error
    return rule


@pytest.mark.parametrize(
    ("error", "known", "exact", "remaining", "why"),
    [
        (0.003, True, True, 1, "reuse"),  # within a third of the tolerance
        (0.0034, True, True, 1, "last"),
        (0.0034, True, True, 2, "reuse"),
        (0.0, False, True, 1, "last"),  # nothing has been measured yet
        (0.0, True, False, 1, "last"),  # where the end is guessed it may not be the last one
        (0.0, True, False, 2, "last"),
        (0.0, True, False, 3, "reuse"),
    ],
)
def test_the_last_step_is_spared_where_little_is_expected(error, known, exact, remaining, why):
    rule = rule_after_a_refresh(kappa=1.0 if known else None, error=error)
    step = Step(1, 0.9, 0.9, remaining, exact)
    assert rule.decide(Call(step=step), Read(outside=[0.0, 1.0, 1.0, 1.0])).why == why


@pytest.mark.parametrize(("moved", "weight"), [(0.04, 0.8), (0.05, 1.0), (0.06, 1.0)])
def test_the_first_gap_is_bounded_where_latents_stand_still(moved, weight):
    """At high noise outputs change while latents do not: m / (0.5 sqrt(0.01)), lambda 0."""
    rule = rule_after_a_refresh(lambda_=0.0)
    step = Step(1, 0.999, 0.998, 10, coordinate=0.9 - moved, step_gain=0.001)
    decision = rule.decide(Call(step=step), Read(outside=[0.0, 1.0, 1.0, 1.0]))
    assert decision.weight == pytest.approx(weight)


def test_the_score_is_its_formula():
    """Error over the tolerance plus lambda times the spatial term, times gamma, all written out."""
    gamma, lambda_, tolerance, kappa, speed, error = 0.4, 0.7, 0.02, 0.6, 1.7, 0.004
    rule = rule_after_a_refresh(gamma, lambda_, tolerance, kappa=kappa, error=error)
    rule.speed = speed
    generator = torch.Generator().manual_seed(1)
    latents = rule.reference + 0.1 * torch.randn(1, 6, 4, generator=generator)
    step = Step(1, 0.8, 0.73, 9)
    call = Call(latents=latents, step=step)
    (decision,) = decide([rule], [call], DecisionScope())
    x, x0 = latents.double(), rule.reference.double()
    drift = float((x - x0).norm() / x0.norm())
    std, std0 = (float(each.std(-1, unbiased=False).mean()) for each in (x, x0))
    spatial = abs(std - std0) / std0
    expected = error + kappa * drift * 0.07 * speed
    assert decision.temporal == pytest.approx(drift, rel=1e-5)
    assert decision.spatial == pytest.approx(spatial, rel=1e-4)
    assert decision.expected_offset == pytest.approx(kappa * drift, rel=1e-5)
    assert decision.expected_error == pytest.approx(expected, rel=1e-5)
    score = expected / tolerance + lambda_ * spatial
    assert decision.weight == pytest.approx(gamma * score, rel=1e-4) and gamma * score < 1.0
    assert not decision.compute


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7), (2, 7, 3, 4), (2, 7, 2, 3, 4)])
def test_channels_are_the_last_axis_of_tokens_and_the_second_of_pictures_and_clips(shape):
    generator = torch.Generator().manual_seed(1)
    x0, x = torch.randn(2, *shape, generator=generator)
    rule, scale = ErrorRule(1.0, 1.0, 0.01), 0.5
    call = Call(latents=x0, scale=scale, step=Step(0, 0.9, 0.8, 10))
    rule.computed(call, Decision(True, "first"), [], CallRecord("step", 0, 0.9, True, "first"))
    axis = 1 if len(shape) > 3 else -1
    sums = [(x - x0).square().sum() * scale**2, x0.square().sum() * scale**2]
    sums += [scale * each.std(axis, unbiased=False).sum() for each in (x, x0)]
    measured = rule.measure(Call(latents=x, scale=scale)).outside
    torch.testing.assert_close(torch.stack(list(measured)), torch.stack(sums))


def test_errors_of_reused_steps_add_up_and_a_refresh_ends_them():
    rule = rule_after_a_refresh(lambda_=0.0, tolerance=1.0, kappa=0.5)
    error = 0.0
    for index, drift in ((1, 0.1), (2, 0.3)):
        step = Step(index, 0.9 - 0.1 * index, 0.8 - 0.1 * index, 9 - index)
        decision = rule.decide(Call(step=step), Read(outside=[drift**2, 1.0, 1.0, 1.0]))
        rule.after_call(Call(step=step), decision)
        error += 0.5 * drift * 0.1
        assert decision.expected_error == pytest.approx(error) and not decision.compute
    call = Call(latents=torch.ones(1, 2, 2), step=Step(3, 0.6, 0.5, 6))
    rule.computed(call, decision, [], CallRecord("step", 3, 0.6, True, "offset"))
    assert rule.error == 0.0


def test_what_a_refresh_found_is_learned_with_the_next_decision():
    """kappa is the forecast's relative error over the drift at that refresh, and speed |v|/|x|."""
    rule = rule_after_a_refresh(kappa=0.5)
    generator = torch.Generator().manual_seed(2)
    latents, fresh, miss = torch.randn(3, 1, 6, 4, generator=generator)
    call = Call(latents=latents, step=Step(1, 0.8, 0.7, 9))
    (decision,) = decide([rule], [call], DecisionScope())
    drift = float((latents - rule.reference).norm() / rule.reference.norm())
    record = CallRecord("step", 1, 0.8, True, "offset")
    rule.computed(call, decision, [miss.square().sum(), fresh.square().sum()], record)
    assert (rule.kappa, record.found_offset) == (0.5, None)
    decide([rule], [Call(latents=latents, step=Step(2, 0.7, 0.6, 8))], DecisionScope())
    offset = float(miss.norm() / fresh.norm())
    assert record.found_offset == pytest.approx(offset, rel=1e-5)
    assert rule.kappa == pytest.approx(offset / drift, rel=1e-5)
    assert rule.speed == pytest.approx(float(fresh.norm() / latents.norm()), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kappa", [None, 0.5])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_refreshed(bad, kappa, place):
    sums = [0.01, 1.0, 1.0, 1.0]
    sums[place] = bad
    decision = rule_after_a_refresh(kappa=kappa).decide(
        Call(step=Step(1, 0.8, 0.7, 9)), Read(outside=sums)
    )
    assert decision.compute and decision.why == "offset"


def test_latents_that_overflow_are_refreshed():
    rule = rule_after_a_refresh(kappa=0.5)
    call = Call(latents=torch.full((1, 6, 4), torch.nan), step=Step(1, 0.8, 0.7, 9))
    (decision,) = decide([rule], [call], DecisionScope())
    assert decision.compute


# -- along a straight trajectory -------------------------------------------------------------------


def synthetic_run(rule, scale=1.0, steps=60, kappa=None):
    """Drive the rule alone along a straight trajectory; returns the refreshed indices."""
    forecast, refreshed = DampedLine(), []
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 1, 8, 4, generator=generator)
    sigmas = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for i in range(steps):
        x = scale * (start + (1.0 - sigmas[i]) * direction)
        v = scale * (direction + 0.3 * math.sin(5.0 * sigmas[i]) * start)
        # one step more than there is: the last one is not the rule's to decide here
        step = Step(i, sigmas[i], sigmas[i + 1], steps + 1 - i)
        call = Call(latents=x, step=step)
        if kappa is not None and forecast.v1 is not None:
            rule.kappa = kappa
            rule._found = []
        (decision,) = decide([rule], [call], DecisionScope())
        rule.after_call(call, decision)
        if decision.compute:
            record = CallRecord("step", i, sigmas[i], True, decision.why)
            rule.computed(call, decision, forecast.missed(step, v), record)
            rule.speed = float(v.norm() / x.norm())
            forecast.update(step, v)
            refreshed.append(i)
    return refreshed


def test_larger_gamma_never_lowers_the_number_of_refreshes():
    """On a fixed trajectory with the error scale held fixed."""
    counts = [
        len(synthetic_run(ErrorRule(gamma, 1.0, 0.01), kappa=0.5))
        for gamma in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 1e6)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 1 and counts[-1] == 60 and len(set(counts)) > 4


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**12])
def test_scaling_all_activations_changes_no_decision(scale):
    expected = synthetic_run(ErrorRule(1.0, 1.0, 0.01))
    assert synthetic_run(ErrorRule(1.0, 1.0, 0.01), scale=scale) == expected
    assert 1 < len(expected) < 60


def test_lambda_zero_drops_the_spatial_term():
    few = synthetic_run(ErrorRule(1.0, 0.0, 0.01))
    many = synthetic_run(ErrorRule(1.0, 50.0, 0.01))
    assert len(few) < len(many)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [*BASES, "Auto"])
@pytest.mark.parametrize("bare", [False, True])
def test_large_gamma_refreshes_every_step_and_is_bit_equal(sampler, use_cache, bare):
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of(use_cache, adacorr_gamma=1e12), bare=bare)
    assert summary.compute_fraction == 1.0
    assert torch.equal(x, plain)


@pytest.mark.parametrize("bare", [False, True])
def test_gamma_zero_alone_refreshes_the_forced_steps_only(sampler, bare):
    config = config_of("Auto", adacorr_gamma=0.0, num_steps=STEPS)
    _, summary = run_cached(sampler, config, bare=bare)
    assert computed(summary) == ([0, STEPS - 2, STEPS - 1] if bare else [0, STEPS - 1])
    assert all(call.weight == 0.0 for call in summary.trace.calls if not call.refreshed)


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_a_gap_is_at_most_half_as_long_again_as_the_last_one(sampler, gamma):
    loose = {"adacorr_tolerance": 1e9, "adacorr_lambda": 0.0, "warmup_steps": 2}
    _, summary = run_cached(sampler, config_of("Auto", adacorr_gamma=gamma, **loose))
    assert computed(summary) == ([0, 1, 3, 6, 11, 19] if gamma else [0, 1])  # gaps of 2, 3, 5, 8


@pytest.mark.parametrize("use_cache", BASES)
def test_base_decides_and_correction_adds_refreshes(sampler, use_cache):
    _, loose = run_cached(sampler, config_of(use_cache, rel_l1_thresh=10.0, adacorr_gamma=0.0))
    assert computed(loose) == [0, STEPS - 1]
    _, strict = run_cached(sampler, config_of(use_cache, rel_l1_thresh=0.0, adacorr_gamma=0.0))
    assert strict.compute_fraction == 1.0
    options = {"rel_l1_thresh": 10.0, "adacorr_tolerance": 1e-3}
    _, watched = run_cached(sampler, config_of(use_cache, **options))
    reasons = {call.reason for call in watched.trace.calls}
    assert "offset" in reasons and "base" not in reasons


@pytest.mark.parametrize("tolerance", [0.003, 0.03, 0.3, 10.0])
@pytest.mark.parametrize("bare", [False, True])
def test_linear_output_is_repaired_to_rounding(transformer, tolerance, bare):
    linear = LinearInSigma()
    transformer.forward = linear.forward
    sampler = FluxSampler(transformer)
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=tolerance), bare=bare)
    assert summary.compute_fraction < 1.0
    if not bare:  # a guessed step size leaves the last payment's remainder unpaid
        torch.testing.assert_close(x, plain, rtol=2e-6, atol=2e-6)


def test_a_bare_model_with_equal_steps_is_repaired_too(transformer):
    """With equal steps the guessed step sizes are right."""
    transformer.forward = LinearInSigma().forward
    sampler = FluxSampler(transformer)
    sampler.scheduler.set_shift(1.0)
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.1), bare=True)
    assert summary.compute_fraction < 1.0
    torch.testing.assert_close(x, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bare", [False, True])
def test_trace_shows_expected_and_found_offsets(sampler, bare):
    _, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.01), bare=bare)
    calls = summary.trace.calls
    assert all(c.temporal > 0.0 for c in calls[1:]), "the temporal signal must not be zero"
    found = [c for c in calls if c.found_offset is not None]
    assert found and all(c.refreshed for c in found)
    assert all(c.expected_offset > 0.0 for c in calls if not c.refreshed and c.step_index > 5)


def test_the_temporal_signal_is_the_drift_of_the_latents(sampler):
    """Of the latents that the transformer is given, against those of the last refresh."""
    seen = []
    call = sampler.call

    def noting(x, *args, **kwargs):
        seen.append(x.double())
        return call(x, *args, **kwargs)

    sampler.call = noting
    _, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.05))
    reference = None
    for record, x in zip(summary.trace.calls, seen, strict=True):
        if reference is not None:
            drift = float((x - reference).norm() / reference.norm())
            assert record.temporal == pytest.approx(drift, rel=1e-4)
            std, std0 = (float(token_std_sum(each)) for each in (x, reference))
            assert record.spatial == pytest.approx(abs(std - std0) / std0, rel=1e-3, abs=1e-6)
        if record.refreshed:
            reference = x
    assert summary.reused_steps > 3
