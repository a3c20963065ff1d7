"""A cache that never acts says so, once, with what to change."""

import logging

import pytest

from xfuser_adacorr import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.adacorrection import warn_once


@pytest.fixture(autouse=True)
def unsaid():
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Fb", {"rel_l1_thresh": 0.0}, "raise rel_l1_thresh"),
        ("Auto", {"adacorr_tolerance": 1e-9}, "raise the tolerance"),
        ("Tea", {"rel_l1_thresh": 0.9, "warmup_steps": 50}, "warmup_steps covers them"),
    ],
)
@pytest.mark.parametrize("with_scheduler", [True, False])
def test_a_run_without_reuse_is_told_once(sampler, caplog, name, options, words, with_scheduler):
    scheduler = sampler.scheduler if with_scheduler else None
    enable_cache(sampler.transformer, name, scheduler=scheduler, **options)
    with caplog.at_level(logging.WARNING):
        sampler.run(8)
        sampler.run(8)
    disable_cache(sampler.transformer)
    told = [r.message for r in caplog.records if "computed every step" in r.message]
    assert len(told) == 1 and name in told[0] and words in told[0]


@pytest.mark.parametrize(("name", "options"), [("Schedule", {"schedule": 1}), ("Auto", {})])
def test_runs_that_reuse_or_were_told_to_compute_all_say_nothing(sampler, caplog, name, options):
    enable_cache(sampler.transformer, name, scheduler=sampler.scheduler, **options)
    with caplog.at_level(logging.WARNING):
        sampler.run(20)
    disable_cache(sampler.transformer)
    assert not [r for r in caplog.records if "computed every step" in r.message]
