"""The comparison, end to end on a tiny random FLUX pipeline."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from benchmark import settings
from benchmark.models import families
from benchmark.run import sweep, workbench
from tests.benchmark.tiny import read_settings, run_study


@pytest.fixture
def command(models, tmp_path):
    """Runs the command with few pictures; returns the exit code."""

    def run(*arguments, output="out"):
        given = ["--model", models / "flux", "--judge", models / "judge"]
        given += ["--num_prompts", 2, "--repetitions", 1, "--warmup", 0, "--threads", 1]
        given += ["--output_dir", tmp_path / output, *arguments]
        return run_study("compare", *given)

    return run


def read(tmp_path, output="out"):
    return json.loads((tmp_path / output / "results.json").read_text())


COMPARISON = (
    "--num_inference_steps",
    6,
    "--cache_methods",
    "None",
    "Fast",
    "--enable_adacorrection",
)
LOOSE = ("--rel_l1_thresh", 9, "--adacorr_tolerance", 9)


def test_a_comparison_writes_results_report_pictures_and_traces(command, tmp_path, capsys):
    assert command(*COMPARISON, *LOOSE) == 0
    results = read(tmp_path)["results"]
    uncached, fast, corrected, *fewer = results
    assert [row["cache_method"] for row in (uncached, fast, corrected)] == [
        "None", "Fast", "Fast+AdaCorrection",
    ]  # fmt: skip
    assert {row["solver"] for row in fewer} == {"Euler", "DPM-Solver++"}
    assert all(row["num_inference_steps"] < 6 for row in fewer)
    assert uncached["psnr_db"] is None and uncached["speedup"] == 1
    assert 0 < fast["compute_fraction"] < 1
    assert 0 < fast["hit_rate"] < 1 and uncached["hit_rate"] == 0
    assert uncached["compute_fraction"] == 1
    flops = fast["denoiser_flops"] / uncached["denoiser_flops"]
    assert fast["compute_fraction"] == pytest.approx(flops, abs=1e-6)
    for row in results:
        assert row["latency_s"]["runs"] == 2
        assert row["fps"] == pytest.approx(1 / row["latency_s"]["median"], rel=1e-3)
        for picture in ("000.png", "001.png"):
            assert (tmp_path / "out" / "pictures" / row["key"] / picture).is_file()
    for row in (fast, corrected):
        trace = json.loads((tmp_path / "out" / row["trace"]).read_text())
        assert len(trace["calls"]) == len(row["computed_calls"]) == 6
        assert row["computed_calls"] == [int(call["refreshed"]) for call in trace["calls"]]
    report = (tmp_path / "out" / "report.md").read_text()
    for text in (
        "| uncached |",
        "| Fast |",
        "| DPM-Solver++, ",
        "Judge distance: Fréchet distance of features of the small classifier",
        "torch 2",
    ):
        assert text in report
    figures = re.findall(r"!\[.*\]\((.*)\)", report)
    assert len(figures) == 3 and all((tmp_path / "out" / path).is_file() for path in figures)
    assert str(tmp_path / "out" / "report.md") in capsys.readouterr().out


def test_flags_win_over_the_configuration_file(command, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text(
        "family: flux\ndefault_method: Fb\n"
        "methods: {Fb: {rel_l1_thresh: 0.5, warmup_steps: 2}, Auto: {adacorr_tolerance: 0.5}}\n"
    )
    arguments = ("--num_inference_steps", 4, "--cache_methods", "Fb", "Auto", "--config", config)
    assert command(*arguments, "--rel_l1_thresh", 0.25) == 0
    uncached, fb, auto, *_ = read(tmp_path)["results"]
    assert uncached["config"] is None
    assert (fb["config"]["rel_l1_thresh"], fb["config"]["warmup_steps"]) == (0.25, 2)
    assert auto["config"]["adacorr_tolerance"] == 0.5
    assert read(tmp_path)["settings"]["cache_options"] == {"rel_l1_thresh": 0.25}


def test_an_interrupted_run_goes_on_where_it_stopped(command, tmp_path, monkeypatch):
    assert command(*COMPARISON, *LOOSE, output="whole") == 0

    made = []
    generate_row = workbench.generate_row

    def interrupted(pipe, settings, row, *arguments):
        if row.name == "Fast+AdaCorrection" and "Fast+AdaCorrection" not in made:
            made.append(row.name)
            raise KeyboardInterrupt
        made.append(row.name)
        return generate_row(pipe, settings, row, *arguments)

    monkeypatch.setattr(workbench, "generate_row", interrupted)
    assert command(*COMPARISON, *LOOSE) == 130
    assert not (tmp_path / "out" / "results.json").exists()
    assert command(*COMPARISON, *LOOSE) == 2
    assert command(*COMPARISON, *LOOSE, "--resume", "--split", "development") == 2
    made.clear()
    made.append("Fast+AdaCorrection")
    assert command(*COMPARISON, *LOOSE, "--resume") == 0
    assert "None" not in made and "Fast" not in made

    timing = ("latency_s", "fps", "speedup")
    whole, resumed = (
        [{k: v for k, v in row.items() if k not in timing} for row in read(tmp_path, o)["results"]]
        for o in ("whole", "out")
    )
    assert resumed == whole


def test_a_sweep_draws_curves_and_interpolates_them(command, tmp_path, monkeypatch):
    knobs = [{"rel_l1_thresh": value} for value in (0.1, 0.3, 9)]
    lists = {name: knobs for name in ("Fb", "Fb+AdaCorrection")}
    lists["Auto"] = [{"adacorr_tolerance": value} for value in (0.05, 9)]
    monkeypatch.setitem(sweep.SWEEPS, "flux", {8: lists})
    flux = families.FAMILIES["flux"]
    short = replace(flux, ode=replace(flux.ode, steps=12))
    monkeypatch.setitem(families.FAMILIES, "flux", short)
    methods = ("--cache_methods", "Fb", "Auto", "--enable_adacorrection")
    assert command("--sweep", "--num_inference_steps", 8, *methods) == 0
    document = read(tmp_path)
    assert all(row["latency_s"] is None for row in document["results"])
    assert all(row["psnr_ode_db"]["mean"] > 0 for row in document["results"])
    euler = [row for row in document["results"] if row["cache_method"] == "Euler, fewer steps"]
    (half,) = (row for row in euler if row["compute_fraction"] == 0.5)
    (entry,) = (
        entry
        for entry in document["interpolated"]
        if entry["cache_method"] == "Euler, fewer steps" and entry["compute_fraction"] == 0.5
    )
    assert entry["psnr_db"] == half["psnr_db"]["mean"]
    report = (tmp_path / "out" / "report.md").read_text()
    for text in ("at compute fraction 0.25 / 0.35 / 0.5", "| Fb+AdaCorrection | rel_l1_thresh 0.1"):
        assert text in report


def test_the_study_tabulates_gamma_and_lambda(command, tmp_path):
    arguments = ("--gamma_lambda_study", "--num_inference_steps", 6, "--cache_methods", "Auto")
    assert command(*arguments, "--num_prompts", 1, "--adacorr_tolerance", 0.1) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("| Auto | adacorr_tolerance 0.1") == 9
    assert "| adacorr_tolerance 0.1, adacorr_gamma 0.5, adacorr_lambda 2 |" in report


def test_pictures_of_another_size_or_content_are_not_judged(command, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"test": [{"prompt": "a cat", "seed": 1}] * 2}))
    arguments = ("--num_inference_steps", 4, "--cache_methods", "None", "--prompts", prompts)
    assert command(*arguments, "--true_cfg_scale", 2) == 0
    (row,) = read(tmp_path)["results"]
    assert (row["judge_distance"], row["prompt_accuracy"]) == (None, None)
    assert "the classifier does not know such pictures" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--cache_methods", "Fb", "Tee"), "accepted: None, Fb, Tea, Fast, Ada, Auto"),
        (
            ("--model_type", "dalle"),
            "one of dit, flux, opensora, pixart, sd, sd3, wan, got 'dalle'",
        ),
        (("--num_inference_steps", "3"), "at least 4"),
        (("--repetitions", "0"), "at least 1"),
        (("--adacorr_gamma", "-1"), "at least 0"),
        (("--adacorr_tolerance", "0"), "above 0"),
        (("--target_compute", "1.5"), "a share of at most 1"),
        (("--target_speedup", "0.5"), "at least 1"),
        (("--target_compute", "0.4", "--adacorr_tolerance", "1"), "choose one of them"),
        (("--sweep", "--target_compute", "0.5"), "a sweep tries tolerances of its own"),
        (("--adacorr_mode", "loose"), "one of adaptive, literal"),
        (("--height", "65"), "multiple of 16"),
        (("--num_prompts", "65"), "the test split has 64 prompts"),
        (("--prompts", "none.json"), "no file none.json"),
        (("--config", "none.yaml"), "no file none.yaml"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("--sweep", "--gamma_lambda_study"), "not allowed with argument --sweep"),
        (("--gamma_lambda_study", "--adacorr_lambda", "2"), "is what --gamma_lambda_study varies"),
        (("--model", "no/such/directory"), "accepted: a diffusers directory or a hub id"),
        (("--model", "nobody/nothing"), "cannot load 'nobody/nothing' from the hub"),
        (("--resume",), "holds no interrupted run"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(command, tmp_path, capfd, arguments, named):
    assert command(*arguments) == 2
    (line,) = (text for text in capfd.readouterr().err.splitlines() if "error: " in text)
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_of_a_configuration_file_name_the_accepted_ones(command, tmp_path, capsys):
    config = tmp_path / "own.yaml"
    config.write_text("family: flux\nmethods: {Fb: {threshold: 0.5}}\n")
    assert command("--config", config) == 2
    told = capsys.readouterr().err
    assert "unknown option 'threshold'; accepted: adacorr_gamma, adacorr_lambda, " in told
    assert "did you mean 'rel_l1_thresh'?" in told


def test_a_corrupt_model_is_named(command, models, tmp_path, capsys):
    broken = shutil.copytree(models / "flux", tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    assert command("--model", broken) == 2
    assert "broken is not a readable FluxPipeline" in capsys.readouterr().err
    (broken / "model_index.json").unlink()
    assert command("--model", broken) == 2
    assert "has no model_index.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be_written_is_named(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(output="file/out") == 2
    assert "file is no writable directory" in capsys.readouterr().err


def test_the_default_output_directory_is_new_and_the_newest_is_resumed(tmp_path):
    assert settings.default_output_dir(tmp_path, "flux", False) == tmp_path / "flux-001"
    (tmp_path / "flux-009").mkdir()
    assert settings.default_output_dir(tmp_path, "flux", False) == tmp_path / "flux-010"
    assert settings.default_output_dir(tmp_path, "flux", True) == tmp_path / "flux-009"


def test_the_published_command_is_understood():
    given = read_settings(
        "--model_type flux --cache_methods None Fast Fast+AdaCorrection --num_inference_steps 30 "
        "--enable_adacorrection --adacorr_gamma 1.0 --adacorr_lambda 1.0".split()
    )
    assert given.cache_methods == ("None", "Fast", "Fast+AdaCorrection")
    assert given.cache_options == {"adacorr_gamma": 1.0, "adacorr_lambda": 1.0}
    assert given.num_inference_steps == (30,)


def test_enable_adacorrection_adds_the_corrected_methods_once():
    given = read_settings(
        "--cache_methods None Fb Tea Fb+AdaCorrection Auto+AdaCorrection --enable_adacorrection"
        "".split()
    )
    expected = ("None", "Fb", "Fb+AdaCorrection", "Tea", "Tea+AdaCorrection", "Auto")
    assert given.cache_methods == expected
