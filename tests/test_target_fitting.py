"""What the scripts fit and search, on runs whose rates are known and on a tiny pipeline."""

import math
from pathlib import Path

import pytest

from xfuser_adacorr import cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.context import CallRecord, Trace
from xfuser_adacorr.model_executor.cache.engine import engine_of
from xfuser_adacorr.model_executor.cache.samplers import RAW_OUTPUT, NoiseSchedule
from xfuser_adacorr.model_executor.cache.target_fitting import (
    TargetRecorder,
    expected_error,
    measured_rates,
)

SCRIPTS = Path(__file__).parent.parent / "scripts"


def trace_of(kappa, velocity, steps=10):
    """Every other call refreshed, errors as the offset estimation expects them."""
    calls = []
    for i in range(steps):
        call = CallRecord(
            "cond", i, 1.0 - i / steps, i % 2 == 0, "offset" if i % 2 == 0 else "reuse"
        )
        call.temporal = velocity / steps
        call.expected_offset = kappa * call.temporal
        call.expected_error = call.expected_offset * velocity / steps
        calls.append(call)
    sigmas = [1.0 - i / steps for i in range(steps + 1)]
    schedule = NoiseSchedule(sigmas, sigmas[:-1], [1.0 / steps] * steps, [RAW_OUTPUT] * steps, None)
    return Trace("Auto", calls), schedule


def test_rates_are_read_from_a_trace():
    trace, schedule = trace_of(kappa=0.25, velocity=1.6)
    rates = measured_rates(trace, schedule)
    # after the third refresh (call 4) on: the calls 5, 7, 9
    assert [place for place, _ in rates] == pytest.approx([0.5, 0.3, 0.1])
    assert [rate for _, rate in rates] == pytest.approx([math.sqrt(0.25) * 1.6] * 3)
    one = 0.25 * 0.16 * 0.16
    assert expected_error(trace.calls) == pytest.approx(5 * one)


def test_recorder_fits_profile_and_relation():
    recorder = TargetRecorder()
    for kappa in (0.1, 0.2, 0.4):
        trace, schedule = trace_of(kappa, 1.6)
        recorder.add(trace, schedule, 30.0 - 20.0 * math.log10(expected_error(trace.calls)))
    recorder.add(*trace_of(0.1, 1.6), math.inf)  # an identical picture tells nothing
    calibration = recorder.fit()
    assert (calibration.relation.at_one, calibration.relation.slope) == pytest.approx((30.0, 20.0))
    assert recorder.spread_db(calibration.relation) == pytest.approx(0.0, abs=1e-9)
    mean = 1.6 * (2 * math.sqrt(0.1) + math.sqrt(0.2) + math.sqrt(0.4)) / 4
    assert [rate for _, rate in calibration.profile.points] == pytest.approx([mean] * 3)
    with pytest.raises(ValueError, match="a fit needs runs with reused calls"):
        TargetRecorder().fit()


def test_rates_of_a_real_run_are_those_that_its_target_felt(sampler):
    enable_cache(sampler.transformer, "Auto", adacorr_tolerance=0.02, scheduler=sampler.scheduler)
    sampler.run(20)
    schedule = engine_of(sampler.transformer).clock.schedule
    rates = measured_rates(cache_summary(sampler.transformer).trace, schedule)
    assert rates and all(rate > 0.0 and math.isfinite(rate) for _, rate in rates)
