"""Traces: saved, loaded, and what summaries make of them."""

import json

import pytest
import torch

from xfuser_adacorr import CallRecord, Trace
from xfuser_adacorr.model_executor.cache.trace import TRACE_SCHEMA, summary_of, tensor_bytes


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
        (f'{{"schema": {TRACE_SCHEMA + 1}, "calls": []}}', f"at most {TRACE_SCHEMA}, got"),
        ('{"schema": 2, "method": "Fb"}', "not a trace of a cache"),
        ('{"schema": 2, "method": "Fb", "calls": [{"step": 1}]}', "not a trace of a cache"),
    ],
)
def test_files_that_are_no_traces_are_rejected(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace.load(tmp_path / "bad.json")


def record(context, step, refreshed, **more):
    return CallRecord(context, step, 1.0 - step / 10, refreshed, "base", **more)


def test_a_trace_survives_its_file(tmp_path):
    calls = [
        record("step", 0, True, calls=2, computed_calls=2, found_offset=0.1),
        record("step", 1, False, run_blocks=(True, False), compute_fraction=0.5, kept_tokens=3),
    ]
    trace = Trace("Fast", calls, {"use_cache": "Fast"})
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    assert json.loads((tmp_path / "trace.json").read_text())["schema"] == TRACE_SCHEMA
    with pytest.raises(FileNotFoundError, match="trace: no file .*none.json"):
        Trace.load(tmp_path / "none.json")


def test_a_summary_counts_steps_calls_and_compute():
    """A step of two calls, one of them reused; one with a call computed in half; one reused."""
    calls = [
        record("cond", 0, True),
        record("uncond", 0, False, compute_fraction=0.0, computed_calls=0),
        record("step", 1, True, calls=2, computed_calls=2),
        record("step", 2, False, calls=2, computed_calls=0, compute_fraction=0.25),
    ]
    summary = summary_of(Trace("Auto", calls), memory_bytes=2**20)
    assert (summary.num_steps, summary.computed_steps, summary.reused_steps) == (3, 1, 2)
    assert (summary.calls, summary.computed_calls) == (6, 3)
    assert summary.compute_fraction == pytest.approx((1 + 0 + 2 + 2 * 0.25) / 6)
    assert summary.hit_rate == pytest.approx(1 - summary.compute_fraction)
    assert str(summary) == (
        "Auto: 1 of 3 steps computed, 3 of 6 calls\ncompute fraction 0.583, cache memory 1.00 MiB"
    )


def test_bytes_are_of_distinct_storages():
    x, y = torch.zeros(4, 8), torch.zeros(3, dtype=torch.bfloat16)
    state = {"a": [x, x[1:], x.view(-1)], "b": (y, None), "c": record("step", 0, True)}
    assert tensor_bytes(state) == 4 * 32 + 2 * 3
