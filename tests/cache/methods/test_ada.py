"""AdaCache on FLUX against the published rule, and what a corrected or compiled model changes."""

from itertools import pairwise

import pytest
import torch

from tests.cached import refreshed
from tests.published_ada import (
    EVERY_STEP,
    STEPS,
    PublishedRule,
    assert_varied,
    flux_codebook,
    flux_reference,
)
from tests.tiny import all_blocks, euler
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of


def test_flux_follows_the_published_rule(sampler):
    codebook = flux_codebook(sampler)
    rule = PublishedRule(codebook)
    expected = euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    enable_cache(sampler.transformer, "Ada", codebook=codebook, scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    summary = cache_summary(sampler.transformer)
    assert refreshed(summary) == rule.computed
    assert_varied(rule.computed)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    changes = [call.base_signal for call in summary.trace.calls]
    assert changes[:2] == [None, None]
    assert list(dict.fromkeys(changes[2:-1])) == pytest.approx(rule.changes[:-2], rel=1e-4)


@pytest.mark.parametrize(("steps", "rate"), [(8, 20), (9, 3)])
def test_first_two_and_last_two_calls_are_computed(sampler, steps, rate):
    enable_cache(sampler.transformer, "Ada", codebook={1e9: rate}, scheduler=sampler.scheduler)
    sampler.run(steps)
    calls = refreshed(cache_summary(sampler.transformer))
    expected = {0, 1, steps - 2, steps - 1} | set(range(1, steps, rate))
    assert [i for i, computed in enumerate(calls) if computed] == sorted(expected)


def test_every_call_computed_is_bit_equal(sampler):
    plain = sampler.run(STEPS)
    enable_cache(sampler.transformer, "Ada", rel_l1_thresh=0.0, scheduler=sampler.scheduler)
    assert torch.equal(sampler.run(STEPS), plain)
    assert cache_summary(sampler.transformer).compute_fraction == 1.0


def test_rel_l1_thresh_scales_the_thresholds(sampler):
    codebook, runs = flux_codebook(sampler), []
    halved = {key / 2: rate for key, rate in codebook.items()}
    for options in ({"codebook": halved}, {"codebook": codebook, "rel_l1_thresh": 0.5}):
        enable_cache(sampler.transformer, "Ada", scheduler=sampler.scheduler, **options)
        sampler.run(STEPS)
        runs.append(refreshed(cache_summary(sampler.transformer)))
        disable_cache(sampler.transformer)
    assert runs[0] == runs[1] and not all(runs[0])


def test_warmup_calls_divide_by_the_steps_that_really_lie_between(sampler):
    enable_cache(
        sampler.transformer,
        "Ada",
        codebook={1e9: 3},
        warmup_steps=6,
        scheduler=sampler.scheduler,
    )
    sampler.run(STEPS)
    calls = cache_summary(sampler.transformer).trace.calls
    assert [call.step_index for call in calls if call.refreshed][:8] == [0, 1, 2, 3, 4, 5, 8, 11]
    rule = PublishedRule(EVERY_STEP)
    euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    measured = [call.base_signal for call in calls[2:7]]
    assert measured == pytest.approx(rule.changes[:5], rel=1e-4)


@pytest.mark.parametrize("mode", ["adaptive", "literal"])
def test_corrected_variant_keeps_the_signal_and_no_residual(sampler, mode):
    config = CacheConfig(
        use_cache="Ada", codebook={1e9: 2}, enable_adacorrection=True, adacorr_mode=mode
    )
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    sampler.run(STEPS, stop_after=10)
    (rule,) = site_of(sampler.transformer).tracker.run.branches.values()
    state = rule.state if mode == "adaptive" else rule.state.inner
    assert state.stack.residual is None
    assert state.reference is not None
    assert cache_summary(sampler.transformer).reused_steps > 0


def test_correction_may_only_shorten_the_distance(sampler):
    def computed(**options):
        enable_cache(
            sampler.transformer, "Ada", codebook={1e9: 5}, scheduler=sampler.scheduler, **options
        )
        sampler.run(STEPS)
        calls = cache_summary(sampler.transformer).trace.calls
        disable_cache(sampler.transformer)
        return [i for i, call in enumerate(calls) if call.refreshed]

    tight = computed(enable_adacorrection=True, adacorr_tolerance=1e-3)
    assert len(tight) > len(computed())
    assert all(b - a <= 5 for a, b in pairwise(tight))


def test_compiled_blocks_stay_one_graph_with_the_same_decisions(sampler):
    options = {"codebook": flux_codebook(sampler), "scheduler": sampler.scheduler}
    enable_cache(sampler.transformer, "Ada", **options)
    eager = sampler.run(STEPS)
    decisions = refreshed(cache_summary(sampler.transformer))
    torch._dynamo.reset()
    for block in all_blocks(sampler.transformer):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(sampler.run(STEPS), eager, rtol=1e-4, atol=1e-4)
    assert refreshed(cache_summary(sampler.transformer)) == decisions
