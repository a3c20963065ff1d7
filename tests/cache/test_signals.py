"""Signals against their formulas in float64."""

import math

import pytest
import torch

from benchmark.run.flops import count_flops
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.signals import (
    Read,
    Signal,
    l1_sums,
    l2_sums,
    ratio,
    read,
    token_std_sum,
)


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
    measured = math.sqrt(ratio(*[s.item() for s in l2_sums(x, reference)]))
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


@pytest.mark.parametrize("sums", [(math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)])
def test_ratio_of_what_is_not_finite_is_infinite(sums):
    """So that it is above every threshold: nothing is reused on the strength of it."""
    assert ratio(*sums) == math.inf


def test_reading_nothing_touches_no_device(host_reads):
    assert read([], DecisionScope()) == [] and read([Signal()], DecisionScope()) == [Read()]
    assert host_reads == []


def test_flops_of_a_linear_layer_and_attention_are_counted():
    layer = torch.nn.Linear(8, 16)
    _, flops = count_flops(layer, torch.randn(3, 8))
    assert flops == 2 * 3 * 8 * 16
    q = torch.randn(1, 2, 5, 8)
    _, flops = count_flops(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert flops == 2 * (2 * 2 * 5 * 5 * 8)
