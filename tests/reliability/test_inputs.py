"""A denoiser that is called with other conditioning in the middle of a run is computed anew."""

import pytest

from tests.pipelines import CASES, run
from xfuser_adacorr import CacheConfig, cache_summary, enable_cache

STEPS = 10
METHODS = {
    "Auto": {"adacorr_tolerance": 10.0},
    "Fb": {"rel_l1_thresh": 100.0},
    "Tea": {"rel_l1_thresh": 100.0},
    "Fast": {"rel_l1_thresh": 100.0},
    "Fb+AdaCorrection": {"rel_l1_thresh": 100.0, "adacorr_tolerance": 10.0},
    "Schedule": {"schedule": [0, 1]},
}
"""So loose that nothing but a change of the inputs asks for a step, once a run has begun."""


@pytest.mark.parametrize("name", METHODS)
def test_a_controlnet_that_begins_and_ends_midway_refreshes(name):
    case = CASES["flux-controlnet"]
    pipe = enable_cache(case.build(), CacheConfig.from_name(name, **METHODS[name]))
    arguments = {"control_guidance_start": 0.4, "control_guidance_end": 0.7}
    run(case, pipe, steps=STEPS, **arguments)
    calls = cache_summary(pipe).trace.calls
    assert {call.step_index for call in calls if call.reason == "inputs"} == {4, 7}
    refreshed = {call.step_index for call in calls if call.refreshed}
    assert len(refreshed) <= 6 and {0, 4, 7} <= refreshed


def test_a_controlnet_that_acts_throughout_refreshes_nothing():
    case = CASES["flux-controlnet"]
    pipe = enable_cache(case.build(), CacheConfig.from_name("Tea", **METHODS["Tea"]))
    run(case, pipe, steps=STEPS)
    assert all(call.reason != "inputs" for call in cache_summary(pipe).trace.calls)


def test_guidance_that_ends_midway_is_computed_at_once():
    """Its last steps have one call where the ones before have two."""
    case = CASES["lumina2-truncated-guidance"]
    pipe = enable_cache(case.build(), "Auto", adacorr_tolerance=10.0)
    run(case, pipe, steps=STEPS)
    calls = cache_summary(pipe).trace.calls
    numbers = [call.calls for call in calls]
    changes = [i for i in range(1, STEPS) if numbers[i] != numbers[i - 1]]
    assert changes and all(calls[i].refreshed or calls[i + 1].refreshed for i in changes)


def test_drift_is_that_of_the_samplers_latents():
    """Fill has a mask and a picture beside them in the model's input."""
    case = CASES["flux-fill"]
    pipe = case.build()
    latents = []

    def note(pipe, index, timestep, given):
        latents.append(given["latents"].clone())
        return given

    enable_cache(pipe, "Auto", adacorr_tolerance=0.05)
    run(case, pipe, steps=STEPS, callback_on_step_end=note)
    calls = cache_summary(pipe).trace.calls
    refreshed = [i for i, call in enumerate(calls) if call.refreshed]
    for i, call in enumerate(calls[2:], 2):
        since = max(k for k in refreshed if k < i)
        if since == 0 or call.temporal is None or since not in (i - 1,):
            continue
        before, now = latents[since - 1], latents[i - 1]
        drift = float((now - before).norm() / before.norm())
        assert call.temporal == pytest.approx(drift, rel=0.05)
