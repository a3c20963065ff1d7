"""Replay: the decisions of saved traces, bit for bit."""

import pytest
import torch

from tests.cache.test_run import CONFIGS
from tests.cached import reads_per_call, refreshed, run_cached
from tests.tiny import FluxSampler, make_tiny_flux
from tests.tiny_families import FAMILIES, FamilySampler, cached, loose
from xfuser_adacorr import CacheConfig, Trace, cache_summary, disable_cache, enable_cache

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


def run_recorded(sampler, config, **kwargs):
    return run_cached(sampler, config, **{"steps": STEPS, **kwargs})


def replaying(trace):
    return CacheConfig(use_cache="Replay", trace=trace)


@each_recorded
def test_saved_and_loaded_trace_replays_bit_for_bit(tmp_path, config):
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_recorded(sampler, config)
    summary.trace.save(tmp_path / "trace.json")
    loaded = Trace.load(tmp_path / "trace.json")
    assert loaded.calls == summary.trace.calls
    assert CacheConfig.from_dict(loaded.config) == config
    again, replayed = run_recorded(sampler, replaying(tmp_path / "trace.json"))
    assert torch.equal(again, x)
    calls = [(call.step_index, call.refreshed) for call in summary.trace.calls]
    assert [(call.step_index, call.refreshed) for call in replayed.trace.calls] == calls
    assert replayed.method == "Replay"
    assert torch.equal(run_recorded(sampler, replaying(replayed.trace))[0], x), "of a replay too"


def test_branches_are_replayed_apart():
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_recorded(sampler, CONFIGS[0], guidance=3.0)
    flags = {
        branch: [c.refreshed for c in summary.trace.calls if c.context == branch]
        for branch in ("cond", "uncond")
    }
    assert all(any(each) and not all(each) for each in flags.values())
    assert torch.equal(run_recorded(sampler, replaying(summary.trace), guidance=3.0)[0], x)


def test_steps_with_several_calls_are_replayed():
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_recorded(sampler, CONFIGS[3], guidance=3.0)
    assert 0 < summary.reused_steps and summary.calls == 2 * STEPS
    assert torch.equal(run_recorded(sampler, replaying(summary.trace), guidance=3.0)[0], x)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[5]], ids=lambda c: c.name)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_bare_transformer_is_replayed(config, guidance):
    sampler = FluxSampler(make_tiny_flux())
    x, summary = run_recorded(sampler, config, bare=True, guidance=guidance)
    assert summary.reused_steps > 0
    again, replayed = run_recorded(sampler, replaying(summary.trace), bare=True, guidance=guidance)
    assert torch.equal(again, x) and refreshed(replayed) == refreshed(summary)


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
    _, summary = run_recorded(sampler, CONFIGS[1])
    _, own = run_recorded(sampler, CONFIGS[1], batch=2, seed=5)
    flags = [call.refreshed for call in summary.trace.calls]
    _, replayed = run_recorded(sampler, replaying(summary.trace), batch=2, seed=5)
    assert [call.refreshed for call in replayed.trace.calls] == flags
    changed = Trace.from_dict(summary.trace.to_dict())
    changed.calls[1].refreshed = not flags[1]
    _, replayed = run_recorded(sampler, replaying(changed))
    assert [call.refreshed for call in replayed.trace.calls] == [
        flag != (index == 1) for index, flag in enumerate(flags)
    ]
    assert own.num_steps == STEPS


def test_replay_reads_nothing(host_reads):
    sampler = FluxSampler(make_tiny_flux())
    plain = reads_per_call(sampler, host_reads)
    for config in (CONFIGS[0], CONFIGS[3]):
        enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
        reads_per_call(sampler, host_reads)
        trace = cache_summary(sampler.transformer).trace
        disable_cache(sampler.transformer)
        enable_cache(sampler.transformer, replaying(trace), scheduler=sampler.scheduler)
        assert reads_per_call(sampler, host_reads)[1:] == plain[1:]
        disable_cache(sampler.transformer)


def test_run_that_the_trace_does_not_know_is_refused(sampler):
    _, summary = run_recorded(sampler, CONFIGS[1])
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
        ({}, TypeError, "missing 1 required keyword-only argument: 'trace'"),
        ({"trace": "nowhere.json"}, FileNotFoundError, "trace: no file nowhere.json"),
        ({"trace": 3}, TypeError, "trace must be a Trace or the path of a saved one, got 3"),
        (
            {"trace": "x", "warmup_steps": 2},
            ValueError,
            "warmup_steps is an option of .*, not of Replay",
        ),
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
