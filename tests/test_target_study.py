"""The study of targets: what is compared with what, resuming, the figure, the command, mistakes."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmark import target_report, target_study
from benchmark.report.plots import plot_calibration
from benchmark.run.generate import Generated
from benchmark.run.rows import cached_row, uncached_row
from benchmark.run.store import Store
from benchmark.score.pictures import psnr_db
from benchmark.small.judge import Judge, save_judge
from tests.test_benchmark_cli import tiny_pipeline
from xfuser_adacorr import CacheConfig
from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.targets import PsnrRelation
from xfuser_adacorr.model_executor.cache.correction.targets import TargetCalibration
from xfuser_adacorr.model_executor.cache.target_calibration import save_target_calibration

UNCACHED = uncached_row(20)
ROWS = [
    cached_row("Auto", 20, CacheConfig(use_cache="Auto", **option))
    for option in ({"target_compute": 0.4}, {"target_psnr": 45.0}, {"adacorr_tolerance": 0.01})
]


class Maker:
    """Two grey pictures, off by 0.01 (40 dB) and 0.001 (60 dB); what is expected is 2 dB more."""

    def __init__(self):
        self.made = []

    def __call__(self, row):
        self.made.append(row.name)
        pictures = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
        if row.config is None:
            return Generated(pictures)
        expects = row.config.adacorr_tolerance is None
        summaries = [
            SimpleNamespace(compute_fraction=c, expected_psnr_db=e if expects else None)
            for c, e in ((0.4, 42.0), (0.45, 62.0))
        ]
        offsets = torch.tensor([0.01, 0.001]).double().view(2, 1, 1, 1)
        return Generated(pictures + offsets, summaries)


def measured(folder, make):
    return target_study.measure(Store(folder), UNCACHED, ROWS, make, psnr_db)


def test_points_hold_what_every_picture_cost_reached_and_expected(tmp_path):
    compute, fidelity, tolerance = measured(tmp_path, Maker())
    assert (compute["option"], compute["value"]) == ("target_compute", 0.4)
    assert (fidelity["option"], fidelity["value"]) == ("target_psnr", 45.0)
    assert compute["psnr_db"] == pytest.approx([40.0, 60.0], abs=1e-3)
    assert compute["compute_fraction"] == [0.4, 0.45]
    assert compute["expected_psnr_db"] == [42.0, 62.0]
    assert tolerance["expected_psnr_db"] is None
    assert target_report.off_target(compute) == pytest.approx(0.45 / 0.4 - 1)
    assert target_report.off_target(fidelity) is None


def test_a_resumed_study_makes_nothing_again(tmp_path):
    results = measured(tmp_path, Maker())
    make = Maker()
    assert measured(tmp_path, make) == json.loads(json.dumps(results))
    assert make.made == []


def test_an_expectation_without_bound_is_capped_as_psnr_is(tmp_path):
    class Whole(Maker):
        def __call__(self, row):
            made = super().__call__(row)
            for summary in made.summaries:
                summary.expected_psnr_db = float("inf")
            return made

    assert measured(tmp_path, Whole())[0]["expected_psnr_db"] == [100.0, 100.0]


def test_agreement_of_points_worked_out_by_hand():
    points = [(40.0, 42.0), (50.0, 47.0), (60.0, 61.0)]  # off by -2, 3, -1
    found = target_report.agreement(points, 2.0)
    # deviations from the means (50, 50): (-10, -8), (0, -3), (10, 11)
    assert found["correlation"] == pytest.approx(190 / (200 * 194) ** 0.5, abs=1e-4)
    assert found["mean_deviation_db"] == pytest.approx(0.0)
    assert found["mean_absolute_deviation_db"] == pytest.approx(2.0)
    assert found["within_spread"] == pytest.approx(2 / 3, abs=1e-4)
    # a factor of 1.5 is 3.52 dB
    assert target_report.agreement([(40.0, 43.5), (40.0, 36.4)], 9.0)["met"] == 0.5
    assert (found["pictures"], found["spread_db"]) == (3, 2.0)


@pytest.mark.parametrize("points", [[], [(40.0, 41.0)], [(40.0, 41.0), (40.0, 43.0)]])
def test_too_few_points_have_no_correlation(points):
    found = target_report.agreement(points, 2.0)
    assert found["correlation"] is None
    assert found["pictures"] == len(points)


def test_identical_pictures_and_points_that_expect_nothing_are_left_out():
    results = [
        {"option": "a", "expected_psnr_db": [40.0, 99.0], "psnr_db": [41.0, 100.0]},
        {"option": "a", "expected_psnr_db": [100.0, 50.0], "psnr_db": [80.0, 52.0]},
        {"option": "b", "expected_psnr_db": None, "psnr_db": [60.0, 60.0]},
    ]
    assert target_report.pairs(results) == [(40.0, 41.0), (50.0, 52.0)]
    assert list(target_report.agreements(results, 1.0)) == ["a", "all"]


def test_report_and_figure(tmp_path):
    results = measured(tmp_path, Maker())
    document = {
        "environment": {"torch": "2.13"},
        "settings": {
            "model": "m",
            "split": "test",
            "num_inference_steps": [20],
            "guidance_scale": 3.0,
        },
        "calibration": {"psnr": {"at_one": 25.0, "slope": 20.0}, "settings": {"spread_db": 1.0}},
        "prompts": [{}, {}],
        "agreement": target_report.agreements(results, 1.0),
        "results": results,
    }
    report = target_report.render(document, "calibration.png")
    for line in (
        "2 prompts of the test split, 20 steps, guidance 3.",
        "| target_compute 0.4 | 0.425 (0.400-0.450) | +12.5%, not held | 50.0 (40.0) | 52.0 |",
        "| target_psnr 45 | 0.425 (0.400-0.450) | - | 50.0 (40.0) | 52.0 |",
        "| adacorr_tolerance 0.01 | 0.425 (0.400-0.450) | - | 50.0 (40.0) | - |",
        "| all | 4 | 1.000 | +2.0 | 2.0 | 0% | 100% |",
    ):
        assert line in report
    plot_calibration(tmp_path / "calibration.png", results, 1.0)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def command(tmp_path):
    """Runs the study on a tiny random FLUX pipeline; returns the exit code."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "flux")
    torch.manual_seed(1)
    save_judge(Judge().eval(), tmp_path / "judge")

    def run(*options):
        arguments = ["--model", tmp_path / "flux", "--judge", tmp_path / "judge"]
        arguments += ["--output_dir", tmp_path / "out", "--num_inference_steps", 10]
        arguments += ["--num_prompts", 2, "--threads", 1, *options]
        return target_study.main([str(argument) for argument in arguments])

    run.pipe = pipe
    return run


def test_the_command_holds_a_target(command, tmp_path):
    calibration = TargetCalibration(Profile(), PsnrRelation(25.0, 20.0))
    path = tmp_path / "flux" / "transformer" / "targets.json"
    save_target_calibration(path, calibration, command.pipe.transformer, {"spread_db": 2.0})
    points = ("--target_compute", 0.5, "--target_psnr", 30, "--adacorr_tolerance")
    assert command(*points) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["option"] for row in document["results"]] == ["target_compute", "target_psnr"]
    assert document["results"][0]["compute_fraction"] == [0.5, 0.5]
    assert document["calibration"]["psnr"] == {"at_one": 25.0, "slope": 20.0}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "![Expected against true PSNR](calibration.png)" in report
    assert (tmp_path / "out" / "calibration.png").is_file()


def test_a_model_without_calibration_is_told_how_to_make_one(command, tmp_path, capfd):
    assert command("--target_compute", 0.5, "--target_psnr") == 2
    assert "scripts/calibrate_targets.py makes one" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--target_compute", "1.5"), "--target_compute: target_compute must be in (0, 1]"),
        (("--target_psnr", "much"), "--target_psnr"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_are_told_in_one_line(capfd, tmp_path, arguments, named):
    assert target_study.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()
