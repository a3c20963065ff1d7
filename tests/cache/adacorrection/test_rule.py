"""Properties of AdaCorrection, adaptive and literal."""

import math

import pytest
import torch

from tests.tiny import FluxSampler, all_blocks, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.core.offset import Drift
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord
from xfuser_adacorr.model_executor.cache.correction.adacorrection import AdaCorrection, Score
from xfuser_adacorr.model_executor.cache.correction.literal import (
    LiteralCorrection,
    literal_weight,
)
from xfuser_adacorr.model_executor.cache.methods.base import BlockCall

STEPS = 20
BASES = ["Fb", "Tea", "Fast"]


def run_cached(sampler, config, *, bare=False, steps=STEPS):
    scheduler = None if bare else sampler.scheduler
    enable_cache(sampler.transformer, config, scheduler=scheduler)
    x = sampler.run(steps)
    summary = cache_summary(sampler.transformer)
    disable_cache(sampler.transformer)
    return x, summary


def config_of(use_cache, **options):
    if use_cache != "Auto":
        options = {"rel_l1_thresh": 0.3, **options}
    return CacheConfig(use_cache=use_cache, enable_adacorrection=True, **options)


@pytest.mark.parametrize(
    ("error", "known", "exact", "forced"),
    [
        (0.003, True, True, 0),  # within a third of the tolerance
        (0.0034, True, True, 1),
        (0.0, False, True, 1),  # nothing has been measured yet
        (0.0, True, False, 2),  # it may not be the last one
    ],
)
def test_the_last_call_is_spared_where_little_is_expected(error, known, exact, forced):
    correction = AdaCorrection(gamma=1.0, lambda_=1.0, tolerance=0.01)
    score = Score(0.3, Drift(0.1, 0.0), 0.1 if known else None, error, 0.01)
    assert correction.forced_last(Step(9, 0.1, 0.0, 1, exact), score) == forced
    assert correction.forced_last(Step(0, 1.0, 0.9, 10, exact), None) == (1 if exact else 2)


@pytest.mark.parametrize("use_cache", [*BASES, "Auto"])
@pytest.mark.parametrize("bare", [False, True])
def test_large_gamma_refreshes_every_call_and_is_bit_equal(sampler, use_cache, bare):
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of(use_cache, adacorr_gamma=1e12), bare=bare)
    assert summary.compute_fraction == 1.0
    assert torch.equal(x, plain)


@pytest.mark.parametrize("bare", [False, True])
def test_gamma_zero_alone_refreshes_the_forced_calls_only(sampler, bare):
    config = config_of("Auto", adacorr_gamma=0.0, num_steps=STEPS)
    _, summary = run_cached(sampler, config, bare=bare)
    refreshed = [call.step_index for call in summary.trace.calls if call.refreshed]
    assert refreshed == ([0, STEPS - 2, STEPS - 1] if bare else [0, STEPS - 1])
    assert all(call.weight == 0.0 for call in summary.trace.calls if not call.refreshed)


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_a_gap_is_at_most_half_as_long_again_as_the_last_one(sampler, gamma):
    loose = {"adacorr_tolerance": 1e9, "adacorr_lambda": 0.0, "warmup_steps": 2}
    _, summary = run_cached(sampler, config_of("Auto", adacorr_gamma=gamma, **loose))
    refreshed = [call.step_index for call in summary.trace.calls if call.refreshed]
    assert refreshed == ([0, 1, 3, 6, 11, 19] if gamma else [0, 1])  # gaps of 2, 3, 5, 8


@pytest.mark.parametrize("use_cache", BASES)
def test_base_decides_and_correction_adds_refreshes(sampler, use_cache):
    _, loose = run_cached(sampler, config_of(use_cache, rel_l1_thresh=10.0, adacorr_gamma=0.0))
    assert [c.step_index for c in loose.trace.calls if c.refreshed] == [0, STEPS - 1]
    _, strict = run_cached(sampler, config_of(use_cache, rel_l1_thresh=0.0, adacorr_gamma=0.0))
    assert strict.compute_fraction == 1.0
    options = {"rel_l1_thresh": 10.0, "adacorr_tolerance": 1e-3}
    _, watched = run_cached(sampler, config_of(use_cache, **options))
    reasons = {call.reason for call in watched.trace.calls}
    assert "offset" in reasons and "base" not in reasons


def synthetic_calls(correction, scale=1.0, steps=60, kappa=None):
    """Drive the correction alone along a straight trajectory; returns the refreshed indices."""
    history, refreshed = correction.new_state(), []
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 1, 8, 4, generator=generator)
    sigmas = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for i in range(steps):
        x = scale * (start + (1.0 - sigmas[i]) * direction)
        v = scale * (direction + 0.3 * math.sin(5.0 * sigmas[i]) * start)
        step = Step(i, sigmas[i], sigmas[i + 1], steps - i)
        sums = DecisionScope().read([*history.unread, *correction.drift_sums(history, x)])
        if history.unread:
            correction.learn(history, sums[:3])
            sums = sums[3:]
        if kappa is not None and history.v1 is not None:
            history.kappa = kappa
        score = correction.score(history, sums, step) if sums else None
        if score is None or score.weight >= 1.0:
            record = CallRecord("cond", i, sigmas[i], True, "offset")
            correction.refresh(history, x, x, v, step, score, record)
            refreshed.append(i)
        else:
            correction.reuse(history, x, step, score, x.dtype)
    return refreshed


def make_correction(gamma=1.0, lambda_=1.0, tolerance=0.01):
    return AdaCorrection(gamma=gamma, lambda_=lambda_, tolerance=tolerance)


def test_larger_gamma_never_lowers_the_number_of_refreshes():
    """On a fixed trajectory with the error scale held fixed."""
    counts = [
        len(synthetic_calls(make_correction(gamma=gamma), kappa=0.5))
        for gamma in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 1e6)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 1 and counts[-1] == 60 and len(set(counts)) > 4


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**12])
def test_scaling_all_activations_changes_no_decision(scale):
    expected = synthetic_calls(make_correction())
    assert synthetic_calls(make_correction(), scale=scale) == expected
    assert 1 < len(expected) < 60


def test_lambda_zero_drops_the_spatial_term():
    few = synthetic_calls(make_correction(lambda_=0.0))
    many = synthetic_calls(make_correction(lambda_=50.0))
    assert len(few) < len(many)


class LinearInSigma(torch.nn.Module):
    """Stands in for a transformer's forward: the output is linear in sigma, whatever the input."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a, self.b = torch.randn(2, 1, 16, 8, generator=generator, dtype=torch.float64)

    def forward(self, hidden_states, timestep, return_dict=True, **kwargs):
        out = self.a + self.b * timestep.double().view(-1, 1, 1)
        return (out.to(hidden_states.dtype),)


@pytest.mark.parametrize("tolerance", [0.003, 0.03, 0.3, 10.0])
@pytest.mark.parametrize("bare", [False, True])
def test_linear_output_is_compensated_to_rounding(transformer, tolerance, bare):
    linear = LinearInSigma()
    transformer.forward = linear.forward
    sampler = FluxSampler(transformer)
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=tolerance), bare=bare)
    assert summary.compute_fraction < 1.0
    if not bare:  # a guessed step size leaves the last compensation's remainder unpaid
        torch.testing.assert_close(x, plain, rtol=2e-6, atol=2e-6)


def test_remainder_of_a_guessed_step_is_paid_at_the_next_refresh(transformer):
    """With equal steps the guess is right, so the bare transformer is exact too."""
    transformer.forward = LinearInSigma().forward
    sampler = FluxSampler(transformer)
    sampler.scheduler.set_shift(1.0)
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.1), bare=True)
    assert summary.compute_fraction < 1.0
    torch.testing.assert_close(x, plain, rtol=1e-4, atol=1e-4)


def test_trace_shows_expected_and_found_offsets(sampler):
    _, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.01))
    calls = summary.trace.calls
    assert all(c.temporal > 0.0 for c in calls[1:]), "the temporal signal must not be zero"
    found = [c for c in calls if c.found_offset is not None]
    assert found and all(c.refreshed for c in found)
    assert all(c.expected_offset > 0.0 for c in calls if not c.refreshed and c.step_index > 5)


def test_literal_mode_computes_every_block(sampler):
    _, summary = run_cached(sampler, config_of("Fast", adacorr_mode="literal"))
    assert summary.compute_fraction == 1.0
    assert summary.reused_steps > 0
    weights = [c.weight for c in summary.trace.calls if not c.refreshed]
    assert all(0.0 <= w <= 1.0 for w in weights)


def test_literal_weight_follows_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    h, previous = torch.randn(2, 1, 6, 8, generator=generator) * 0.2
    d_temp = (h.double() - previous.double()).norm(dim=-1).mean()
    d_sp = h.double().std(-1, unbiased=False).mean()
    expected = min(max(0.7 * (d_temp**2 + 0.3 * d_sp), 0.0), 1.0)
    assert literal_weight(h, previous, 0.7, 0.3).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0, 3.0])
def test_literal_deviation_is_bounded_on_lipschitz_blocks(gamma):
    """||h^ - B(h)|| <= (1 - w) * Lip * accumulated change of the input since it was fresh."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    lipschitz = torch.linalg.matrix_norm(weight, 2).item()  # tanh is 1-Lipschitz
    correction = LiteralCorrection(gamma=gamma, lambda_=0.2, stream="hidden_states")
    state, travelled, previous, bound_used = correction.new_state(), 0.0, None, []
    hidden = 0.3 * torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    for t in range(12):
        if previous is not None:
            hidden = hidden + 0.05 * torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
            travelled += (hidden - previous).norm().item()
        fresh = {"hidden_states": torch.tanh(hidden @ weight)}
        call = BlockCall(0, 1, None, {}, {"hidden_states": hidden}, lambda out=fresh: out)
        record = CallRecord("cond", t, 1.0 - t / 12, t == 0, "first" if t == 0 else "reuse")
        w = 1.0
        if t > 0:
            w = literal_weight(hidden, previous, gamma, 0.2).item()
        out = correction.blend_block(state, call, fresh, record)
        deviation = (out["hidden_states"] - fresh["hidden_states"]).norm().item()
        bound = (1.0 - w) * lipschitz * travelled
        assert deviation <= bound + 1e-6
        bound_used.append(deviation)
        previous = hidden
    assert gamma > 2.0 or max(bound_used) > 0.0


def test_literal_blend_matches_a_naive_loop():
    """Against Algorithm 1 written out over the blocks of the real transformer."""
    from tests.tiny import embed, euler, head

    sampler = FluxSampler(make_tiny_flux(3))
    model, memory, gamma, lambda_ = sampler.transformer, {}, 0.4, 0.1

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        forced = index == 0
        for n, block in enumerate(all_blocks(model)):
            e_new, h_new = block(h, e, **shared)
            if not forced:
                h_prev, cached_h, cached_e = memory[n]
                d_temp = (h - h_prev).norm(dim=-1).mean()
                d_sp = h.std(-1, unbiased=False).mean()
                w = (gamma * (d_temp**2 + lambda_ * d_sp)).clamp(0, 1)
                h_new = (1 - w) * cached_h + w * h_new
                e_new = (1 - w) * cached_e + w * e_new
            memory[n] = (h, h_new, e_new)
            h, e = h_new, e_new
        return head(model, h, shared)

    expected = euler(sampler, velocity, STEPS)
    config = CacheConfig(
        use_cache="Fb",
        rel_l1_thresh=100.0,
        enable_adacorrection=True,
        adacorr_mode="literal",
        adacorr_gamma=gamma,
        adacorr_lambda=lambda_,
    )
    x, _ = run_cached(sampler, config)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("moved", "weight"), [(0.04, 0.8), (0.05, 1.0), (0.06, 1.0)])
def test_the_first_gap_is_bounded_where_latents_stand_still(moved, weight):
    """At high noise outputs change while latents do not: m / (0.5 sqrt(0.01)), lambda 0."""
    correction = AdaCorrection(gamma=1.0, lambda_=0.0, tolerance=0.01)
    history = correction.new_state()
    history.sigma0 = 0.9
    step = Step(1, 0.999, 0.998, 10, coordinate=0.9 - moved, followed=0.001)
    still = [0.0, 1.0, 1.0, 1.0]
    assert correction.score(history, still, step).weight == pytest.approx(weight)
