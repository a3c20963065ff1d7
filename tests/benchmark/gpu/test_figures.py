"""The GPU figures' command as a dry run on tiny models, and what it refuses."""

import json
import re
import time
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree
from statistics import median

import pytest
import torch

from benchmark.gpu import figures as gpu_figures
from benchmark.gpu import measure as gpu_measure
from benchmark.gpu import models as gpu_models
from benchmark.gpu import report as gpu_report
from benchmark.gpu.probes import (
    computing_calls,
    middle_block,
    synchronising_calls,
    timed_calls,
)
from benchmark.gpu.rows import PEERS, CacheRow, StepPlan
from tests.benchmark.tiny import run_study
from tests.tiny import FluxSampler, all_blocks, make_tiny_flux

STEPS, COMPUTED, ROUNDS = 6, 2, 1
COMPUTED_CALLS = {
    "None": STEPS,
    "Fb": COMPUTED,
    "Ada": COMPUTED + 2,  # and the last two
    "Auto": COMPUTED,  # no error exceeds the tolerance, so the last one is spared
    "Fast+AdaCorrection": COMPUTED,
    "diffusers FirstBlockCache": 1,  # it has no warm-up
    "diffusers TaylorSeer": COMPUTED + 1,  # and the second after them
}
OURS = [name for name in COMPUTED_CALLS if name != "None" and not name.startswith("diffusers")]
SIZES = ["--steps", str(STEPS), "--computed_steps", str(COMPUTED), "--rounds", str(ROUNDS)]


def dry_run(output_dir, *arguments):
    return run_study("gpu", "--dry_run", *SIZES, "--output_dir", output_dir, *arguments)


def read(output_dir):
    document = json.loads((output_dir / "results.json").read_text())
    return {
        (result["model"], result["mode"]): {row["cache_method"]: row for row in result["rows"]}
        for result in document["results"]
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The output directory of a dry run."""
    output_dir = tmp_path_factory.mktemp("gpu") / "out"
    run = ["--model", "flux", "--modes", "eager", "--rows", *COMPUTED_CALLS]
    assert dry_run(output_dir, *run) == 0
    return output_dir


@pytest.fixture
def copied(measured, tmp_path):
    return Path(copytree(measured, tmp_path / "out"))


@pytest.fixture(scope="module")
def rows(measured):
    return read(measured)["flux", "eager"]


def test_shares_of_computed_calls_are_those_of_the_schedule(rows):
    assert {name: row["computed_calls"] for name, row in rows.items()} == COMPUTED_CALLS
    assert all(row["calls"] == STEPS for row in rows.values())


def test_every_timed_call_is_counted_once(rows):
    for name, row in rows.items():
        reused = row["reused_call_ms"]
        assert row["computed_call_ms"]["calls"] == ROUNDS * COMPUTED_CALLS[name]
        assert (reused["calls"] if reused else 0) == ROUNDS * (STEPS - COMPUTED_CALLS[name])
        for part in filter(None, (row["computed_call_ms"], reused)):
            assert 0 < part["q1"] <= part["median"] <= part["q3"]


def test_shares_and_speedup_are_relative_to_the_uncached_row(rows, measured):
    full = rows["None"]["computed_call_ms"]["median"]
    assert rows["None"]["reused_share_of_full_call"] is None
    assert rows["None"]["speedup"] == 1.0
    for name, row in rows.items():
        quotient = rows["None"]["generation_s"] / row["generation_s"]
        assert row["speedup"] == pytest.approx(quotient, rel=1e-2)
        if name != "None":
            share = row["reused_call_ms"]["median"] / full
            assert row["reused_share_of_full_call"] == pytest.approx(share, rel=1e-2)


def test_seconds_are_sorted_by_what_the_trace_says(measured):
    kept = json.loads((measured / "rows" / "flux-eager.json").read_text())["Auto"]
    pairs = [pair for r in kept["rounds"] for pair in zip(r["computed"], r["seconds"], strict=True)]
    row = read(measured)["flux", "eager"]["Auto"]
    for kind, which in (("computed_call_ms", True), ("reused_call_ms", False)):
        seconds = [s for computed, s in pairs if computed is which]
        assert row[kind]["median"] == pytest.approx(1e3 * median(seconds), abs=1e-3)


def test_host_waits_at_most_once_more_in_a_call_of_ours(rows):
    without = rows["None"]["host_synchronisations"]["computed"]["max"]
    for name in OURS:
        waits = rows[name]["host_synchronisations"]
        assert waits["reused"]["max"] <= without + 1
        assert waits["computed"]["max"] <= without + 2  # a new run reads its schedule
    assert rows["Auto"]["host_synchronisations"]["reused"]["median"] == 1
    assert rows["diffusers FirstBlockCache"]["host_synchronisations"]["reused"]["median"] == 1
    assert rows["diffusers TaylorSeer"]["host_synchronisations"]["reused"]["max"] == 0


def test_memory_of_a_cpu_is_the_stated_one(rows):
    assert all(row["peak_memory_added_bytes"] is None for row in rows.values())
    latents = 16 * 16 * 4  # 16 tokens of 16 channels in float32
    for name, row in rows.items():
        if name in OURS:
            assert row["cache_memory_bytes"] >= 2 * latents
        else:
            assert row["cache_memory_bytes"] is None


PEERS_COMPUTED = {
    "diffusers FirstBlockCache": 1,
    "diffusers TaylorSeer": COMPUTED + 1,
    "diffusers TaylorSeer lite": COMPUTED + 1,
    "cache-dit DBCache F1B0": COMPUTED,
    "xfuser fbcache": 1,
    "xfuser teacache": 2,  # its count of steps begins with the second call
}


@pytest.mark.parametrize(
    ("model", "row"),
    [pytest.param(m, row, id=f"{m}: {row.name}") for m, rows in PEERS.items() for row in rows],
)
def test_others_caches_compute_what_the_schedule_says_in_every_generation(model, row):
    if row.name.startswith("cache-dit"):
        pytest.importorskip("cache_dit")
    tiny = gpu_models.TINY[model]
    pipe = tiny.make(torch.device("cpu"), torch.float32)
    block = middle_block(pipe.transformer)
    with row.enabled(pipe, StepPlan(STEPS, COMPUTED)):
        tiny.generate(pipe, STEPS)
        with computing_calls(pipe.transformer, block) as computed:
            tiny.generate(pipe, STEPS)
    assert sum(computed) == PEERS_COMPUTED[row.name] and len(computed) == STEPS


def test_compiled_blocks_keep_their_graphs(tmp_path):
    run = ["--model", "flux", "--modes", "compile", "--rows", "Fb"]
    assert dry_run(tmp_path / "out", *run) == 0
    rows = read(tmp_path / "out")["flux", "compile"]
    assert list(rows) == ["None", "Fb"]
    for name, row in rows.items():
        assert row["computed_calls"] == COMPUTED_CALLS[name]
        assert row["graph_breaks"] == row["recompiles_while_timed"] == 0
    assert rows["None"]["graphs"] >= 2  # double and single blocks


def test_report_has_a_line_for_every_row(measured):
    text = (measured / "report.md").read_text()
    assert "a dry run of tiny models" in text.splitlines()[0]
    lines = text.partition("## flux, eager")[2].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in cells] == ["method", *COMPUTED_CALLS]
    assert {len(row) for row in cells} == {len(gpu_report.COLUMNS)}
    assert {row[0]: row[1] for row in cells[1:]} == {
        name: f"{computed} / {STEPS}" for name, computed in COMPUTED_CALLS.items()
    }
    assert {row[-1] for row in cells[1:]} == {"0, 0, 0"}  # nothing is compiled


def test_another_model_joins_a_run_that_is_resumed(copied):
    kept = (copied / "rows" / "flux-eager.json").read_text()
    more = ["--model", "opensora", "--modes", "eager", "--resume", "--rows", "Fast+AdaCorrection"]
    assert dry_run(copied, *more) == 0
    assert (copied / "rows" / "flux-eager.json").read_text() == kept
    results = read(copied)
    assert list(results) == [("flux", "eager"), ("opensora", "eager")]
    computed = {name: row["computed_calls"] for name, row in results["opensora", "eager"].items()}
    assert computed == {"None": STEPS, "Fast+AdaCorrection": COMPUTED}


def test_a_row_that_fails_is_told_and_tried_again(copied, monkeypatch):
    def fail(pipe, schedule):
        raise RuntimeError("no kernel\nfor this device")

    before = json.loads((copied / "rows" / "flux-eager.json").read_text())
    run = ["--model", "flux", "--modes", "eager", "--rows", "broken", "--resume"]
    monkeypatch.setitem(PEERS, "flux", (CacheRow(name="broken", enabled=fail),))
    assert dry_run(copied, *run) == 0
    rows = read(copied)["flux", "eager"]
    assert rows["broken"]["error"] == "RuntimeError: no kernel for this device"
    assert rows["Auto"]["computed_calls"] == COMPUTED_CALLS["Auto"]
    assert "- broken: RuntimeError" in (copied / "report.md").read_text()

    mended = CacheRow(name="broken", enabled=lambda *_: nullcontext())
    monkeypatch.setitem(PEERS, "flux", (mended,))
    assert dry_run(copied, *run) == 0
    assert read(copied)["flux", "eager"]["broken"]["computed_calls"] == STEPS
    after = json.loads((copied / "rows" / "flux-eager.json").read_text())
    assert {name: entry for name, entry in after.items() if name != "broken"} == before


def test_a_trace_that_the_blocks_contradict_is_told(copied, monkeypatch):
    monkeypatch.setattr(gpu_measure.Bench, "traced", lambda self, row: [True] * STEPS)
    run = ["--model", "flux", "--modes", "eager", "--rows", "Fb+AdaCorrection", "--resume"]
    assert dry_run(copied, *run) == 0
    error = read(copied)["flux", "eager"]["Fb+AdaCorrection"]["error"]
    assert "the trace says that calls 0, 1, 2, 3, 4, 5 were computed" in error
    assert error.endswith("the blocks ran in 0, 1")


def test_probes_give_the_model_back_and_count():
    sampler = FluxSampler(make_tiny_flux())
    model, cls = sampler.transformer, type(sampler.transformer)
    scheduler, stepped = sampler.scheduler, type(sampler.scheduler)
    block = all_blocks(model)[3]
    handle = block.register_forward_hook(lambda *_: torch.ones(3).tolist() and None)
    x, t = sampler.noise(), torch.tensor(500.0)
    with synchronising_calls(sampler) as waits:
        sampler.call(x, t)
    handle.remove()
    with synchronising_calls(sampler) as none, timed_calls(sampler) as seconds:
        sampler.call(x, t)
    with computing_calls(model, block) as computed:
        sampler.call(x, t)
        block.forward = lambda hidden_states, encoder_hidden_states, *_, **__: (
            encoder_hidden_states,
            hidden_states,
        )
        sampler.call(x, t)
    assert waits[0] == none[0] + 1 and len(waits) == len(none) == 1
    assert len(seconds) == 1 and seconds[0] > 0
    assert computed == [True, False]
    assert type(model) is cls and type(scheduler) is stepped and "tolist" not in vars(torch.Tensor)


def test_a_schedulers_step_counts_to_the_call_before():
    sampler = FluxSampler(make_tiny_flux())
    pauses = iter([0.05, 0.0, 0.1])
    original = type(sampler.scheduler).step

    class Slow(type(sampler.scheduler)):
        def step(self, *args, **kwargs):
            time.sleep(next(pauses))
            return original(self, *args, **kwargs)

    sampler.scheduler.__class__ = Slow
    sampler.run(3)
    pauses = iter([0.5, 0.0, 1.0])
    with timed_calls(sampler) as seconds:
        sampler.run(3)
    assert len(seconds) == 3
    assert seconds[0] > 0.5 and seconds[2] > 1.0 and seconds[1] < seconds[2]


def test_models_have_the_published_sizes():
    counts = {}
    for name, model in gpu_models.SIZED.items():
        with torch.device("meta"):
            transformer = model.transformer(**model.config)
        counts[name] = sum(p.numel() for p in transformer.parameters())
    assert counts["flux"] == 11_901_408_320  # FLUX.1-dev
    assert counts["opensora"] == pytest.approx(1.208e9, rel=5e-3)  # STDiT3-XL/2


def test_weights_are_made_in_their_dtype():
    before = torch.get_default_dtype()
    pipe = gpu_models.TINY["opensora"].make(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "--steps must be at least 4 above --computed_steps 2, got 5"),
        (["--computed_steps", "1"], "--computed_steps must be at least 2, got 1"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--modes", "cudagraphs"], "cudagraphs needs a GPU; accepted with --dry_run: eager"),
        (["--rows", "Fb", "Fbb"], "--rows: 'Fbb' is no row; accepted: None, Fb, Tea"),
        (["--resume"], "holds no interrupted run"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, message):
    assert dry_run(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_the_dry_run_works(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_study("gpu", "--output_dir", tmp_path / "out") == 2
    assert re.search("no GPU: .*--dry_run", capsys.readouterr().err)
    assert run_study("gpu", "--dry_run") == 2
    assert "--output_dir must be given with --dry_run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_do_not_resume(measured, capsys):
    assert dry_run(measured, "--resume", "--steps", "9") == 2
    assert "--resume: steps was 6" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_all_modes_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_figures, "SIZED", gpu_models.TINY)
    run = ["--output_dir", str(tmp_path / "out"), *SIZES, "--rows", *OURS]
    assert run_study("gpu", *run) == 0
    for rows in read(tmp_path / "out").values():
        for name in OURS:
            assert "error" not in rows[name], rows[name]
            assert rows[name]["computed_calls"] == COMPUTED_CALLS[name]
            assert rows[name]["peak_memory_added_bytes"] >= 0
            assert rows[name]["host_synchronisations"]["reused"]["max"] <= 1
            assert rows[name]["graph_breaks"] == rows[name]["recompiles_while_timed"] == 0
