"""The Pareto command, end to end on a tiny random FLUX pipeline."""

import json
from dataclasses import replace

import pytest

from benchmark import cli
from benchmark.errors import BenchmarkError
from benchmark.models import families
from benchmark.run import sweep, tuning, workbench
from benchmark.studies import pareto
from benchmark.studies.catalogue import STUDIES
from tests.benchmark.tiny import run_study

METHODS = ("Auto", "Schedule+AdaCorrection", "diffusers:MagCache")


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """Runs the command on few short rows; returns the exit code."""
    lists = {
        "Fb": [{"rel_l1_thresh": value} for value in (0.3, 9)],
        "Auto": [{"adacorr_tolerance": value} for value in (0.05, 9)],
    }
    monkeypatch.setitem(sweep.SWEEPS, "flux", {8: lists})
    flux = families.FAMILIES["flux"]
    monkeypatch.setitem(families.FAMILIES, "flux", replace(flux, ode=replace(flux.ode, steps=10)))
    monkeypatch.setattr(sweep, "SCHEDULE_SHARES", (0.25, 0.5))
    monkeypatch.setattr(sweep, "FEWER_STEPS", (0.5, 0.5))

    def run(*arguments):
        given = ["--model", models / "flux", "--judge", models / "judge", "--threads", 1]
        given += ["--num_prompts", 2, "--num_inference_steps", 8, "--tuning_prompts", 1]
        given += ["--search_evaluations", 3, "--results_dir", tmp_path / "out"]
        given += ["--output_dir", tmp_path / "work", *arguments]
        return run_study("pareto", *given)

    return run


def test_the_command_writes_results_tables_and_curves_and_is_resumed(
    command, tmp_path, monkeypatch
):
    assert command("--methods", *METHODS) == 0
    document = json.loads((tmp_path / "out" / "pareto_flux_8.json").read_text())
    results = document["results"]
    by_name = {}
    for result in results:
        by_name.setdefault(result["cache_method"], []).append(result)
    (uncached,) = by_name["None"]
    assert uncached["compute_fraction"] == 1 and uncached["denoiser_flops"] > 0
    for result in by_name["Euler, fewer steps"]:
        share = result["num_inference_steps"] / 8
        assert result["compute_fraction"] == pytest.approx(share, abs=1e-6)
    searched = by_name["Schedule+AdaCorrection"]
    assert [len(result["config"]["schedule"]) for result in searched] == [2, 4]
    for result in searched:
        share = len(result["config"]["schedule"]) / 8
        assert result["compute_fraction"] == pytest.approx(share, abs=1e-6)
    ratios = json.loads((tmp_path / "work" / "tuning" / "magcache-8.json").read_text())
    assert len(ratios) == 8 and ratios[0] == 1
    calibrated = by_name["diffusers:MagCache"]
    assert all(result["config"]["options"]["mag_ratios"] == ratios for result in calibrated)
    assert min(result["compute_fraction"] for result in calibrated) < 1
    assert {entry["at"] for entry in document["at_fractions"]} == {0.25, 0.35, 0.5}
    assert all("samples" not in result for result in results)
    report = (tmp_path / "out" / "pareto_flux_8.md").read_text()
    for text in ("Auto against the best of all others", "| Euler, fewer steps |", "bootstrap"):
        assert text in report
    assert (tmp_path / "out" / "pareto_flux_8.png").stat().st_size > 10_000

    def made(*arguments):
        raise AssertionError("a finished row was made again")

    monkeypatch.setattr(workbench, "generate_row", made)
    monkeypatch.setattr(tuning, "make_picture", made)
    assert command("--methods", *METHODS) == 2  # the directory is taken
    assert command("--methods", *METHODS, "--resume") == 0
    again = json.loads((tmp_path / "out" / "pareto_flux_8.json").read_text())
    for part in ("results", "at_fractions", "tuning"):
        assert again[part] == document[part]
    timing = ("--latency", "--repetitions", 1, "--warmup", 0)
    assert command("--methods", *METHODS, "--resume", *timing) == 0
    timed = json.loads((tmp_path / "out" / "pareto_flux_8.json").read_text())
    assert {result["latency_s"]["runs"] for result in timed["results"]} == {2}  # schedules too
    assert (tmp_path / "out" / "pareto_flux_8_latency.png").stat().st_size > 10_000
    report = (tmp_path / "out" / "pareto_flux_8.md").read_text()
    assert "## PSNR to uncached (dB) at equal time, 8 steps" in report


def test_learned_rows_are_added_to_a_finished_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "LEARNED_SHARES", (0.5,))
    assert command("--methods", "Auto") == 0
    kept = {path.name for path in (tmp_path / "work" / "rows").glob("*.json")}
    assert command("--methods", "Auto", "Learned", "Auto, learn=1", "--resume") == 0
    document = json.loads((tmp_path / "out" / "pareto_flux_8.json").read_text())
    (learning,) = (r for r in document["results"] if r["cache_method"] == "Auto, learn=1")
    assert learning["compute_fraction"] == pytest.approx(0.5, abs=1e-6), "of the pictures alone"
    assert any("Learned: no plan for 8 steps" in reason for reason in document["left_out"])
    rows = {path.name for path in (tmp_path / "work" / "rows").glob("*.json")}
    assert len(rows - kept) == 1 and kept < rows


def chosen(arguments):
    settings, options = cli.read(STUDIES["pareto"], arguments)
    return pareto.pareto_settings(settings, options.methods)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tuning_prompts", "0"), "--tuning_prompts must be at least 1"),
        (("--methods", "Tee"), "accepted: None, Fb, .*got 'Tee'"),
        (("--model_type", "dit", "--methods", "xfuser:fbcache"), "accepted: flux"),
    ],
)
def test_mistakes_are_named(arguments, named):
    with pytest.raises(BenchmarkError, match=named):
        chosen(arguments)


def test_all_our_methods_and_all_peers_of_the_family_are_taken_by_default():
    settings, left_out = chosen(["--model_type", "dit"])
    assert {"Auto", "Fb+AdaCorrection", "Schedule", "diffusers:FirstBlockCache"} <= set(
        settings.cache_methods
    )
    assert "xfuser:fbcache" not in settings.cache_methods
    assert any("xfuser:fbcache" in reason for reason in left_out)
    assert settings.mode == "pareto" and settings.ode_reference
