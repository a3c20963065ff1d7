"""The study of compute budgets: what is compared with what, resuming, the command, mistakes."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmark.run.generate import Generated
from benchmark.run.rows import cached_row, uncached_row
from benchmark.run.store import Store
from benchmark.score.pictures import psnr_db
from benchmark.studies import budget
from tests.benchmark.tiny import run_study
from xfuser_adacorr import CacheConfig

UNCACHED = uncached_row(20)
ROWS = [cached_row("Auto", 20, CacheConfig.from_name("Auto", target_compute=0.4))]


class Maker:
    """Two grey pictures, off by 0.01 (40 dB) and 0.001 (60 dB), which took 8 and 9 of 20 steps."""

    def __init__(self):
        self.made = []

    def __call__(self, row):
        self.made.append(row.name)
        pictures = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
        if row.config is None:
            return Generated(pictures)
        summaries = [SimpleNamespace(compute_fraction=share) for share in (0.4, 0.45)]
        offsets = torch.tensor([0.01, 0.001]).double().view(2, 1, 1, 1)
        return Generated(pictures + offsets, summaries)


def measured(folder, make):
    return budget.measure(Store(folder), UNCACHED, ROWS, make, psnr_db)


def test_a_budget_has_what_every_picture_cost_and_how_far_that_is_off(tmp_path):
    (result,) = measured(tmp_path, Maker())
    assert (result["target_compute"], result["compute_fraction"]) == (0.4, [0.4, 0.45])
    assert result["psnr_db"] == pytest.approx([40.0, 60.0], abs=1e-3)
    assert budget.off_target(result, 20) == pytest.approx(1)
    (line,) = budget.budgets_table([result], 20).cells
    assert line == ("0.4", "0.425 (0.400-0.450)", "+1.0 steps, not held", "50.0 (40.0)")
    (line,) = budget.budgets_table([{**result, "compute_fraction": [0.4, 0.4]}], 20).cells
    assert line[2] == "+0.0 steps, held"


def test_a_resumed_study_makes_nothing_again(tmp_path):
    results = measured(tmp_path, Maker())
    make = Maker()
    assert measured(tmp_path, make) == json.loads(json.dumps(results))
    assert make.made == []


def test_the_command_holds_a_budget(models, tmp_path):
    arguments = ["--model", models / "flux", "--judge", models / "judge", "--budgets", 0.5]
    arguments += ["--output_dir", tmp_path / "out", "--num_inference_steps", 10]
    assert run_study("budget", *arguments, "--num_prompts", 2, "--threads", 1) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["compute_fraction"] for row in document["results"]] == [[0.5, 0.5]]
    assert (
        "| 0.5 | 0.500 (0.500-0.500) | +0.0 steps, held |"
        in (tmp_path / "out" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--budgets", "1.5"), "--budgets must be a share of at most 1"),
        (("--budgets", "much"), "--budgets: invalid float value"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_are_told_in_one_line(capfd, tmp_path, arguments, named):
    assert run_study("budget", *arguments, "--output_dir", tmp_path / "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()
