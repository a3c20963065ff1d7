"""Traces: saved, loaded, averaged, and replayed bit for bit."""

import json

import pytest
import torch

from tests.test_engine import CONFIGS
from tests.test_synchronisation import host_reads, reads_per_call  # noqa: F401 (a fixture)
from tests.tiny import FluxSampler, make_tiny_flux
from tests.tiny_families import FAMILIES, FamilySampler, cached, loose
from xfuser_adacorr import (
    CacheConfig,
    Trace,
    cache_summary,
    disable_cache,
    enable_cache,
    schedule_from_traces,
)
from xfuser_adacorr.model_executor.cache.context import CallRecord

STEPS = 16
RECORDED = [
    *CONFIGS,
    CacheConfig(use_cache="Fast", rel_l1_thresh=0.1, static_tokens=True, motion_threshold=0.5),
    CacheConfig(use_cache="Schedule", schedule=3),
    CacheConfig(use_cache="Schedule", schedule=[0, 2, 7], stand_in="forecast"),
    CacheConfig(use_cache="Auto", target_compute=0.4),
]
each_recorded = pytest.mark.parametrize(
    "config", RECORDED, ids=[f"{i}-{c.name}" for i, c in enumerate(RECORDED)]
)


def run_cached(sampler, config, *, bare=False, **kwargs):
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    x = sampler.run(**{"steps": STEPS, **kwargs})
    summary = cache_summary(sampler.transformer)
    disable_cache(sampler.transformer)
    return x, summary


def replaying(trace):
    return CacheConfig(use_cache="Replay", trace=trace)


@each_recorded
def test_saved_and_loaded_trace_replays_bit_for_bit(tmp_path, config):
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_cached(sampler, config)
    summary.trace.save(tmp_path / "trace.json")
    loaded = Trace.load(tmp_path / "trace.json")
    assert loaded.calls == summary.trace.calls
    assert CacheConfig.from_dict(loaded.config) == config
    again, replayed = run_cached(sampler, replaying(tmp_path / "trace.json"))
    assert torch.equal(again, x)
    calls = [(call.step_index, call.refreshed) for call in summary.trace.calls]
    assert [(call.step_index, call.refreshed) for call in replayed.trace.calls] == calls
    assert replayed.method == "Replay"
    assert torch.equal(run_cached(sampler, replaying(replayed.trace))[0], x), "of a replay too"


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=["Fb", "Auto"])
def test_branches_are_replayed_apart(config):
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_cached(sampler, config, guidance=3.0)
    refreshed = {
        branch: [c.refreshed for c in summary.trace.calls if c.context == branch]
        for branch in ("cond", "uncond")
    }
    assert all(any(flags) and not all(flags) for flags in refreshed.values())
    assert torch.equal(run_cached(sampler, replaying(summary.trace), guidance=3.0)[0], x)


def test_bare_transformer_is_replayed():
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_cached(sampler, CONFIGS[3], bare=True)
    assert torch.equal(run_cached(sampler, replaying(summary.trace), bare=True)[0], x)


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_every_family_is_replayed(tiny):
    recorded = cached(tiny, loose("Tea+AdaCorrection"))
    x = recorded.run(6)
    trace = cache_summary(recorded.model).trace
    again = FamilySampler(tiny)
    enable_cache(again.model, replaying(trace), scheduler=again.scheduler)
    assert torch.equal(again.run(6), x)


def test_decisions_come_from_the_trace_and_not_from_the_signal(sampler):
    """Other noise, under which the method itself would decide otherwise."""
    _, summary = run_cached(sampler, CONFIGS[1])
    _, own = run_cached(sampler, CONFIGS[1], batch=2, seed=5)
    flags = [call.refreshed for call in summary.trace.calls]
    _, replayed = run_cached(sampler, replaying(summary.trace), batch=2, seed=5)
    assert [call.refreshed for call in replayed.trace.calls] == flags
    changed = Trace.from_dict(summary.trace.to_dict())
    changed.calls[1].refreshed = not flags[1]
    _, replayed = run_cached(sampler, replaying(changed))
    assert [call.refreshed for call in replayed.trace.calls] == [
        flag != (index == 1) for index, flag in enumerate(flags)
    ]
    assert own.num_steps == STEPS


def test_replay_reads_nothing(host_reads):  # noqa: F811
    sampler = FluxSampler(make_tiny_flux())
    plain = reads_per_call(sampler, host_reads)
    for config in (CONFIGS[0], CONFIGS[3]):
        enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
        reads_per_call(sampler, host_reads)
        trace = cache_summary(sampler.transformer).trace
        disable_cache(sampler.transformer)
        enable_cache(sampler.transformer, replaying(trace), scheduler=sampler.scheduler)
        reads_per_call(sampler, host_reads)  # counts FLOPs on the way
        assert reads_per_call(sampler, host_reads)[1:] == plain[1:]
        disable_cache(sampler.transformer)


def test_run_that_the_trace_does_not_know_is_refused(sampler):
    _, summary = run_cached(sampler, CONFIGS[1])
    enable_cache(sampler.transformer, replaying(summary.trace), scheduler=sampler.scheduler)
    with pytest.raises(ValueError, match=r"step 1 was at sigma 0\.\d+, this run's is at 0\.\d+"):
        sampler.run(STEPS + 1)
    with pytest.raises(ValueError, match="it has no branch 'uncond', but 'cond'"):
        sampler.run(STEPS, guidance=2.0)
    sampler.run(STEPS)
    summary.trace.calls.pop()
    disable_cache(sampler.transformer)
    enable_cache(sampler.transformer, replaying(summary.trace), scheduler=sampler.scheduler)
    with pytest.raises(ValueError, match=f"no call at step {STEPS - 1}; it has {STEPS - 1} calls"):
        sampler.run(STEPS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "trace must be given for Replay"),
        ({"trace": "nowhere.json"}, FileNotFoundError, "trace: no file nowhere.json"),
        ({"trace": 3}, TypeError, "trace must be a Trace or the path of a saved one, got 3"),
        ({"trace": "x", "warmup_steps": 2}, ValueError, "warmup_steps must be left at 0 for Rep"),
        ({"trace": Trace("Fb")}, ValueError, "does not say with which options it was made"),
        ({"trace": Trace("Fb", config={"use_cache": "Fb"})}, ValueError, "it has no calls"),
    ],
)
def test_what_cannot_be_replayed_is_explained(sampler, options, error, message):
    with pytest.raises(error, match=message):
        enable_cache(sampler.transformer, "Replay", scheduler=sampler.scheduler, **options)


def test_trace_belongs_to_replay_alone():
    with pytest.raises(ValueError, match="trace is an option of Replay, not of Fb"):
        CacheConfig(use_cache="Fb", trace="x")


def test_first_traces_can_still_be_read(tmp_path):
    call = {"context": "cond", "step_index": 0, "sigma": 1.0, "refreshed": True, "reason": "first"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 1, "method": "Fb", "calls": [call]}))
    trace = Trace.load(path)
    assert (trace.method, trace.config) == ("Fb", None)
    assert trace.calls == [CallRecord("cond", 0, 1.0, True, "first")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("junk", "bad.json"),
        ("[]", "not a trace of a cache"),
        ('{"schema": 4, "calls": []}', "schema must be at most 3, got 4"),
        ('{"schema": 2, "method": "Fb"}', "not a trace of a cache"),
        ('{"schema": 2, "method": "Fb", "calls": [{"step": 1}]}', "not a trace of a cache"),
    ],
)
def test_files_that_are_no_traces_are_rejected(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace.load(tmp_path / "bad.json")


# -- averages --------------------------------------------------------------------------------------


def trace_with(refreshed, steps=6, branches=("cond",)):
    calls = [
        CallRecord(branch, step, 1.0 - step / steps, step in refreshed, "base")
        for step in range(steps)
        for branch in branches
    ]
    return Trace("Auto", calls)


def test_average_of_traces_keeps_their_budget_or_the_majority():
    traces = [trace_with({0, 2, 5}), trace_with({0, 2, 4, 5}), trace_with({0, 1, 5})]
    # refreshed 3, 1, 2, 0, 1, 3 times of 3; 10 refreshes in 3 runs
    assert schedule_from_traces(traces) == (0, 2, 5)
    assert schedule_from_traces(traces, rule="majority") == (0, 2, 5)
    assert schedule_from_traces(traces, computed_steps=4) == (0, 1, 2, 5)
    assert schedule_from_traces(traces, computed_steps=5) == (0, 1, 2, 4, 5)
    assert schedule_from_traces(traces, computed_steps=1) == (0,)


def test_average_counts_the_branches_of_a_step():
    trace = trace_with({0, 3}, branches=("cond", "uncond"))
    trace.calls[2].refreshed = True  # step 1, one branch of two
    assert schedule_from_traces([trace], rule="majority") == (0, 3)
    assert schedule_from_traces([trace], computed_steps=3) == (0, 1, 3)


def test_average_of_traces_can_be_scheduled(sampler):
    traces = [run_cached(sampler, CONFIGS[3], seed=seed)[1].trace for seed in (0, 1)]
    schedule = schedule_from_traces(traces)
    _, summary = run_cached(sampler, CacheConfig(use_cache="Schedule", schedule=schedule))
    assert [c.step_index for c in summary.trace.calls if c.refreshed] == list(schedule)


@pytest.mark.parametrize(
    ("traces", "options", "message"),
    [
        ([], {}, "traces must not be empty"),
        ([Trace("Fb")], {}, "every trace must have calls"),
        ([trace_with({0}), trace_with({0}, steps=7)], {}, "have 6, 7 steps"),
        ([trace_with({0})], {"rule": "mean"}, "rule must be one of budget, majority"),
        ([trace_with({0})], {"computed_steps": 7}, "computed_steps must be from 1 to 6, got 7"),
        ([trace_with({0})], {"computed_steps": 2, "rule": "majority"}, "is for the rule 'budget'"),
    ],
)
def test_traces_that_cannot_be_averaged_are_refused(traces, options, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_traces(traces, **options)
