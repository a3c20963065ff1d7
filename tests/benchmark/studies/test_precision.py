"""The study of half precision: what is compared with what, resuming, the command, mistakes."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmark.run.generate import Generated
from benchmark.run.rows import cached_row, uncached_row
from benchmark.run.store import Store
from benchmark.score.pictures import psnr_db
from benchmark.studies import precision
from tests.benchmark.tiny import run_study
from xfuser_adacorr import CacheConfig

ROWS = [uncached_row(28), cached_row("Auto", 28, CacheConfig.from_name("Auto"))]
DTYPES = ("float32", "bfloat16")
OFFSETS = {("float32", "None"): 0.0, ("float32", "Auto"): 0.001}
OFFSETS |= {("bfloat16", "None"): 0.01, ("bfloat16", "Auto"): 0.02}


class Maker:
    """Grey pictures that differ by `OFFSETS`; the cached ones cost 0.4."""

    def __init__(self):
        self.made = []

    def __call__(self, dtype, row):
        self.made.append((dtype, row.name))
        pictures = torch.full((2, 3, 8, 8), 0.5) + OFFSETS[dtype, row.name]
        summaries = [SimpleNamespace(compute_fraction=0.4)] * 2 if row.config else []
        return Generated(pictures, summaries)


def measured(folder, make):
    return precision.measure(Store(folder), ROWS, DTYPES, make, psnr_db)


def test_each_type_is_compared_with_its_own_uncached_run_and_with_float32(tmp_path):
    exact, auto, half, half_auto = measured(tmp_path, Maker())
    assert exact["psnr_db"] is None and exact["psnr_exact_db"] is None
    assert auto["psnr_db"] == auto["psnr_exact_db"]
    assert auto["psnr_db"]["mean"] == pytest.approx(60, abs=0.01)
    assert half["psnr_db"] is None
    assert half["psnr_exact_db"]["mean"] == pytest.approx(40, abs=0.01)
    assert half_auto["psnr_db"]["mean"] == pytest.approx(40, abs=0.01)
    assert half_auto["psnr_exact_db"]["mean"] == pytest.approx(33.98, abs=0.01)
    assert [row["compute_fraction"] for row in (exact, auto)] == [1.0, 0.4]


def test_a_resumed_study_makes_nothing_again(tmp_path):
    results = measured(tmp_path, Maker())
    make = Maker()
    assert measured(tmp_path, make) == json.loads(json.dumps(results))
    assert make.made == []


def test_the_report_has_a_line_for_each_type_and_method(tmp_path):
    document = {
        "environment": {"torch": "2.13"},
        "settings": {"model": "m", "split": "development", "num_inference_steps": [28]},
        "prompts": [{}, {}],
        "results": measured(tmp_path, Maker()),
    }
    report = precision.render(document)
    for line in (
        "| float32 | uncached | 1.000 | - | - |",
        "| float32 | Auto | 0.400 | 60.0 (min 60.0) | 60.0 (min 60.0) |",
        "| bfloat16 | uncached | 1.000 | - | 40.0 (min 40.0) |",
        "| bfloat16 | Auto | 0.400 | 40.0 (min 40.0) | 34.0 (min 34.0) |",
    ):
        assert line in report


def test_the_command_runs_every_method_in_both_types(models, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", models / "flux", "--judge", models / "judge", "--output_dir", out]
    arguments += ["--num_inference_steps", 4, "--num_prompts", 1, "--cache_methods", "Auto"]
    assert run_study("precision", *arguments, "--threads", 1) == 0
    document = json.loads((out / "results.json").read_text())
    found = [(row["dtype"], row["cache_method"]) for row in document["results"]]
    assert found == [(dtype, name) for dtype in DTYPES for name in ("None", "Auto")]
    assert document["settings"]["dtype"] == list(DTYPES)
    assert document["results"][2]["psnr_exact_db"]["mean"] < 100.0, "bfloat16 rounds"
    assert (out / "report.md").read_text().startswith("# Caching in half precision")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--half", "float64"), "--half"),
        (("--cache_methods", "Nope"), "accepted: None, Fb"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_are_told_in_one_line(capfd, tmp_path, arguments, named):
    assert run_study("precision", *arguments, "--output_dir", tmp_path / "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()
