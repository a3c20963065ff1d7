"""What the scripts fit and search, on runs whose rates are known and on a tiny pipeline."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.test_benchmark_cli import tiny_pipeline
from xfuser_adacorr import CacheConfig, cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.context import CallRecord, Trace
from xfuser_adacorr.model_executor.cache.engine import engine_of
from xfuser_adacorr.model_executor.cache.samplers import RAW_OUTPUT, NoiseSchedule
from xfuser_adacorr.model_executor.cache.stored_schedule import load_schedule
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


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Runs ``search_schedule.py`` on a tiny pipeline; returns the file it wrote."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("calibration_runs", "search_schedule"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import search_schedule

    tiny_pipeline().save_pretrained(tmp_path / "model")
    prompts = [{"prompt": "a red circle", "seed": 1}, {"prompt": "a blue square", "seed": 2}]
    (tmp_path / "prompts.json").write_text(json.dumps({"development": prompts}))

    def run(name, *options):
        output = tmp_path / f"{name}.json"
        given = {"model": tmp_path / "model", "prompts": tmp_path / "prompts.json"}
        given |= {"output": output, "num_inference_steps": 6, "height": 32, "width": 32}
        given |= {"num_prompts": 2}
        arguments = [str(x) for key, value in given.items() for x in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["search_schedule.py", *arguments, *options])
        search_schedule.main()
        return json.loads(output.read_text())

    run.script = search_schedule
    return run


def test_search_script_stores_what_schedule_reads_and_resumes(search, monkeypatch, tmp_path):
    whole = search("whole", "--computed_steps", "3", "--max_evaluations", "6")
    assert (whole["budget"], whole["num_steps"], whole["stand_in"]) == (3, 6, "adacorrection")
    assert whole["settings"]["evaluations"] <= 6 and not list(tmp_path.glob("*.progress.json"))

    score, calls = search.script.LatentsScore.__call__, []

    def interrupted(self, steps):
        calls.append(steps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, steps)

    monkeypatch.setattr(search.script.LatentsScore, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search("again", "--computed_steps", "3", "--max_evaluations", "6")
    assert len(json.loads((tmp_path / "again.progress.json").read_text())["scores"]) == 3
    with pytest.raises(SystemExit, match="is of another search"):
        search("again", "--computed_steps", "3", "--max_evaluations", "7")
    assert search("again", "--computed_steps", "3", "--max_evaluations", "6") == whole
    assert len(calls) == len(set(calls)) + 1, "only the interrupted evaluation is repeated"

    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tmp_path / "model")
    stored = load_schedule(pipe.transformer, str(tmp_path / "whole.json"), "adacorrection")
    assert list(stored.refreshed) == whole["refreshed"]
    config = CacheConfig(
        use_cache="Schedule",
        enable_adacorrection=True,
        calibration=str(tmp_path / "whole.json"),
    )
    enable_cache(pipe, config)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a red circle",
        num_inference_steps=6,
        height=32,
        width=32,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    )
    calls = cache_summary(pipe).trace.calls
    assert [call.step_index for call in calls if call.refreshed] == whole["refreshed"]


def test_search_script_refuses_a_budget_that_the_run_has_not(search):
    for option, value in (("--computed_steps", "7"), ("--compute_fraction", "0.1")):
        with pytest.raises(SystemExit, match="computed steps of 6; from 2 to 6 are accepted"):
            search("x", option, value)
