"""NaN and infinity are refreshed, told once, and forgotten with the run."""

import logging

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.messages import warn_once

STEPS = 8
METHODS = [
    ("Fb", {"rel_l1_thresh": 0.5}),
    ("Tea", {"rel_l1_thresh": 0.3}),
    ("Fast", {"rel_l1_thresh": 0.1}),
    ("Ada", {}),
    ("Auto", {"adacorr_tolerance": 0.05}),
    ("Fb+AdaCorrection", {"rel_l1_thresh": 0.5}),
    ("Auto", {"target_compute": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_computed_told_and_forgotten(name, options, bad, caplog):
    warn_once.cache_clear()
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, name, scheduler=sampler.scheduler, **options)
    expected, noise = sampler.run(STEPS, finish=False), sampler.noise
    sampler.noise = lambda *args: noise(*args) * bad
    with caplog.at_level(logging.WARNING):
        sampler.run(STEPS, finish=False)
        sampler.run(STEPS, finish=False)
    computed = cache_summary(sampler.transformer).computed_steps
    assert computed == (STEPS // 2 if "target_compute" in options else STEPS)
    told = [record for record in caplog.records if "not finite" in record.message]
    assert len(told) == 1
    sampler.noise = noise
    assert torch.equal(sampler.run(STEPS, finish=False), expected)
