"""The tensor maths against the formulas in float64."""

import math

import pytest
import torch

from xfuser_adacorr.core.blend import blend, blend_weights, displacement_weights
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.core.flops import count_flops
from xfuser_adacorr.core.forecast import line_sums, line_weights, updated_damping
from xfuser_adacorr.core.offset import Drift, correction_weight, error_scale, offset_score
from xfuser_adacorr.core.signals import l1_sums, l2_sums, ratio, root_ratio, token_std_sum


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)


def test_l1_ratio_is_the_relative_mean_absolute_change(pair):
    x, reference = pair
    expected = (x.double() - reference.double()).abs().mean() / reference.double().abs().mean()
    assert ratio(*[s.item() for s in l1_sums(x, reference)]) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_l2_ratio_is_the_relative_norm_of_the_change(pair):
    x, reference = pair
    expected = (x.double() - reference.double()).norm() / reference.double().norm()
    measured = root_ratio(*[s.item() for s in l2_sums(x, reference)])
    assert measured == pytest.approx(float(expected), rel=1e-6)


def test_sums_over_token_shards_add_up_to_the_whole(pair):
    x, reference = pair
    for sums in (l1_sums, l2_sums):
        shards = zip(x.split(2, dim=1), reference.split(2, dim=1), strict=True)
        added = torch.stack([torch.stack(sums(*shard)) for shard in shards]).sum(0)
        torch.testing.assert_close(added, torch.stack(sums(x, reference)))


def test_statistics_of_bfloat16_are_taken_in_float32(pair):
    x, reference = (t.bfloat16() for t in pair)
    assert all(s.dtype == torch.float32 for s in [*l1_sums(x, reference), token_std_sum(x)])


def test_token_std_is_the_population_deviation_over_channels(pair):
    x = pair[0]
    d = x.double()
    expected = (d - d.mean(-1, keepdim=True)).square().mean(-1).sqrt().sum()
    assert token_std_sum(x).item() == pytest.approx(float(expected), rel=1e-6)


def test_ratio_of_something_to_nothing_is_infinite():
    assert ratio(1.0, 0.0) == math.inf
    assert ratio(0.0, 0.0) == 0.0


def test_drift_is_relative_to_the_reference(pair):
    x, reference = pair
    sums = [s.item() for s in [*l2_sums(x, reference), token_std_sum(x), token_std_sum(reference)]]
    drift = Drift.from_sums(*sums)
    std, std_ref = x.double().std(-1, False).mean(), reference.double().std(-1, False).mean()
    assert drift.spatial == pytest.approx(float((std - std_ref).abs() / std_ref), rel=1e-5)
    assert drift.temporal == pytest.approx(
        float((x.double() - reference.double()).norm() / reference.double().norm()), rel=1e-6
    )


@pytest.mark.parametrize(
    ("gamma", "score", "expected"),
    [(1.0, 0.4, 0.4), (0.0, 9.0, 0.0), (2.0, 0.4, 0.8), (1e9, 0.1, 1.0)],
)
def test_weight_clips_gamma_times_the_score(gamma, score, expected):
    assert correction_weight(score, gamma) == pytest.approx(expected)


def test_score_adds_lambda_times_the_spatial_term():
    assert offset_score(0.3, 0.2, 0.5) == pytest.approx(0.4)


def test_error_scale_is_offset_per_drift():
    assert error_scale(0.02, 0.1) == pytest.approx(0.2)
    assert error_scale(0.02, 0.0) is None


def test_line_passes_through_both_refreshes():
    assert line_weights(0.8, 0.8, 0.9) == pytest.approx((1.0, 0.0))
    assert line_weights(0.9, 0.8, 0.9) == pytest.approx((0.0, 1.0))
    assert line_weights(0.5, 0.8, None) == (1.0, 0.0)
    assert line_weights(0.5, 0.8, 0.9, damping=0.25) == pytest.approx((1.75, -0.75))


@pytest.mark.parametrize(
    ("happened", "share"), [(1.0, 1.0), (3.0, 1.0), (0.5, 1.0), (0.2, 0.4), (0.0, 0.0), (-1.0, 0.0)]
)
def test_damping_is_the_share_of_the_slope_that_holds(happened, share):
    """At half of the change the line errs as much as the last value: it still counts in full."""
    predicted = torch.tensor([3.0, 4.0])
    aside = torch.tensor([4.0, -3.0])  # says nothing about the slope
    damping = updated_damping(0.8, line_sums(predicted, happened * predicted + aside))
    assert float(damping) == pytest.approx(0.4 + 0.5 * share)


def test_a_line_that_predicts_no_change_is_not_damped():
    assert float(updated_damping(1.0, line_sums(torch.zeros(3), torch.ones(3)))) == 1.0


@pytest.mark.parametrize("sigma1", [None, 0.9])
def test_blend_passes_through_its_ends(sigma1):
    assert blend_weights(0.8, 0.8, 0.5, sigma1) == pytest.approx((1.0, 0.0, 0.0))
    assert blend_weights(0.5, 0.8, 0.5, sigma1) == pytest.approx((0.0, 0.0, 1.0))


def test_parabolic_blend_reproduces_a_parabola():
    def v(s):
        return 2.0 - 3.0 * s + 5.0 * s * s

    b0, b1, b = blend_weights(0.63, 0.8, 0.5, 0.9)
    assert b0 * v(0.8) + b1 * v(0.9) + b * v(0.5) == pytest.approx(v(0.63))


@pytest.mark.parametrize("sigma", [0.79, 0.7, 0.6, 0.51])
def test_linear_blend_lies_between_its_ends(sigma):
    b0, b1, b = blend_weights(sigma, 0.8, 0.5)
    assert b1 == 0.0 and 0.0 <= b <= 1.0 and b0 + b == pytest.approx(1.0)


def test_blend_lies_between_cached_and_fresh(pair):
    cached, fresh = pair
    mixed = blend(cached, fresh, 0.3)
    assert (mixed >= torch.minimum(cached, fresh)).all()
    assert (mixed <= torch.maximum(cached, fresh)).all()


@pytest.mark.parametrize("sigma1", [None, 0.86])
def test_displacement_is_what_the_skipped_calls_owe(sigma1):
    """Against the sum over the calls, for values at the refreshes and forecasts made of them."""
    sigmas, sigma0, fresh, v0, v1, v = [0.78, 0.75, 0.71], 0.8, 0.66, 1.3, 1.1, 1.9
    applied = [line_weights(s, sigma0, sigma1) for s in sigmas]
    d0, d1, d = displacement_weights(sigmas, applied, fresh, sigma0, sigma1)
    owed = 0.0
    for s, end, (a0, a1) in zip(sigmas, [0.75, 0.71, 0.66], applied, strict=True):
        nodes = [(sigma0, v0), (fresh, v)] + ([(sigma1, v1)] if sigma1 else [])
        should = sum(
            y * math.prod((s - other) / (x - other) for other, _ in nodes if other != x)
            for x, y in nodes
        )
        owed += (end - s) * (should - (a0 * v0 + a1 * v1))
    assert d0 * v0 + d1 * v1 + d * v == pytest.approx(owed)


def test_curvature_is_dropped_over_long_gaps():
    applied = [line_weights(0.7, 0.8, 0.81)]
    assert displacement_weights([0.7], applied, 0.6, 0.8, 0.81)[1] == pytest.approx(
        -(0.6 - 0.7) * applied[0][1]
    )


def test_reading_nothing_touches_no_device():
    assert DecisionScope().read([]) == []


def test_flops_of_a_linear_layer_and_attention_are_counted():
    layer = torch.nn.Linear(8, 16)
    _, flops = count_flops(layer, torch.randn(3, 8))
    assert flops == 2 * 3 * 8 * 16
    q = torch.randn(1, 2, 5, 8)
    _, flops = count_flops(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert flops == 2 * (2 * 2 * 5 * 5 * 8)
