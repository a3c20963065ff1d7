"""A forecast that agrees with itself, because what it is measured on went wrong, is not followed.

Latents that hardly move, outputs that stay, and a tolerance that asks for nothing: how long a gap
may be does not depend on them alone.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from benchmark.settings import PIPELINES
from tests.reliability.test_fuzz_calls import PLAIN, Player, enabled
from tests.reliability.toy import Toy
from xfuser_adacorr import AdaCorrection, Auto, Fb, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule

STEPS = 28
LOOSEST = {
    "Auto": Auto(tolerance=1e6),
    "Fb+AdaCorrection": Fb(threshold=1e6, correction=AdaCorrection(tolerance=1e6)),
}


@pytest.fixture
def unguarded(monkeypatch):
    """Gaps may be as long as the signals say."""
    monkeypatch.setattr(ErrorRule, "first_gap", math.inf)
    monkeypatch.setattr(ErrorRule, "gap_growth", math.inf)


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(PIPELINES / "flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, steps=STEPS, method=None):
    """The picture, and the number of computed steps."""
    if method is not None:
        enable_cache(pipe, method)
    picture = pipe(
        prompt="a red circle on a green striped background",
        num_inference_steps=steps,
        height=32,
        width=32,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    if method is None:
        return torch.as_tensor(picture), steps
    computed = cache_summary(pipe).computed_steps
    disable_cache(pipe)
    return torch.as_tensor(picture), computed


def psnr(ours, theirs):
    return -10 * math.log10(float((ours - theirs).square().mean()) + 1e-12)


@pytest.mark.parametrize("name", LOOSEST)
def test_the_loosest_tolerance_keeps_more_of_a_picture_than_fewer_steps(pipe, name):
    plain, _ = sampled(pipe)
    ours, computed = sampled(pipe, method=LOOSEST[name])
    fewer, _ = sampled(pipe, steps=computed)
    assert computed <= STEPS / 4 and psnr(ours, plain) > psnr(fewer, plain)


@pytest.mark.parametrize("name", LOOSEST)
def test_without_a_limit_of_the_gaps_the_loosest_tolerance_loses_the_picture(pipe, name, unguarded):
    """What the test above would see."""
    plain, _ = sampled(pipe)
    ours, computed = sampled(pipe, method=LOOSEST[name])
    fewer, _ = sampled(pipe, steps=computed)
    assert psnr(ours, plain) < psnr(fewer, plain)


def gaps(method):
    """Between the computed steps of a `Toy`, whose forecasts are always right."""
    player = Player(Toy(), FlowMatchEulerDiscreteScheduler())
    with torch.no_grad(), enabled(player.model, method, player.scheduler):
        player.play({**PLAIN, "steps": 60}, cached=True)
        calls = cache_summary(player.model).trace.calls
    return [b - a for a, b in pairwise([c.step_index for c in calls if c.refreshed] + [60])]


def test_a_forecast_that_was_right_is_followed_half_as_long_again_at_the_most():
    found = gaps(Auto())
    assert all(after <= math.ceil(1.5 * before) for before, after in pairwise(found))
    assert len(found) > 6


def test_without_a_limit_a_forecast_that_was_right_is_followed_to_the_end(unguarded):
    """What the test above would see."""
    assert max(gaps(Auto())) > 30
