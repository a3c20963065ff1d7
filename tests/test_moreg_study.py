"""The study of MoReg: halves by motion, equal compute in both readings, resuming, mistakes."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmark import moreg_report, moreg_study
from benchmark.run.generate import Generated
from benchmark.run.store import Store
from benchmark.score.clips import clip_psnr_db
from benchmark.studies.moreg_report import MOREG, PLAIN, RELATIVE_MOREG
from xfuser_adacorr import CacheConfig

FRAMES = 4
STEPS_A_FRAME = (0.01, 0.04, 0.02, 0.03)
"""Brightness that each clip gains from frame to frame."""


def clips():
    ramps = torch.tensor(STEPS_A_FRAME)[:, None] * torch.arange(FRAMES)
    return ramps[:, :, None, None, None].expand(-1, -1, 3, 8, 8).clone()


def test_motion_is_the_mean_difference_of_neighbouring_frames():
    assert moreg_report.motions(clips()) == pytest.approx(STEPS_A_FRAME)
    there_and_back = torch.tensor([0.0, 0.3, 0.0, 0.3])[None, :, None, None, None]
    assert moreg_report.motions(there_and_back) == pytest.approx([0.3])


def test_the_fast_half_moves_most_and_the_middle_clip_is_slow():
    assert moreg_report.halves([0.1, 0.4, 0.2, 0.3]) == {
        "fast": [1, 3], "slow": [0, 2], "all": [0, 1, 2, 3],
    }  # fmt: skip
    assert moreg_report.halves([0.1, 0.4, 0.2])["fast"] == [1]


def test_the_psnr_of_a_clip_is_the_mean_over_its_frames():
    reference = torch.full((1, 2, 3, 8, 8), 0.5)
    wrong = reference.clone()
    wrong[:, 0] += 0.1
    wrong[:, 1] += 0.01
    assert clip_psnr_db(wrong, reference) == pytest.approx([(20 + 40) / 2], abs=1e-3)


ROWS = [
    {"compute_fraction": [0.6, 0.4], "psnr_db": [50.0, 44.0]},
    {"compute_fraction": [0.2, 0.3], "psnr_db": [30.0, 40.0]},
]


@pytest.mark.parametrize(
    ("group", "fraction", "compute", "psnr"),
    [
        ([0, 1], 0.375, [0.4, 0.35], [40.0, 42.0]),  # means 0.25 and 0.5: half way
        ([0], 0.3, [0.3, 0.325], [35.0, 41.0]),  # from 0.2 to 0.6: a quarter of the way
        ([1], 0.4, [0.6, 0.4], [50.0, 44.0]),
    ],
)
def test_all_clips_are_taken_where_the_groups_mean_compute_is_as_wanted(
    group, fraction, compute, psnr
):
    found = moreg_report.at_equal_compute(ROWS, group, fraction)
    assert found["compute_fraction"] == pytest.approx(compute)
    assert found["psnr_db"] == pytest.approx(psnr)


def test_compute_that_is_not_reached_is_not_guessed():
    assert moreg_report.at_equal_compute(ROWS, [0, 1], 0.51) is None
    entries = moreg_report.compared({PLAIN: ROWS, MOREG: ROWS[:1]}, {"all": [0, 1]}, "all", ["all"])
    assert [entry["fraction"] for entry in entries] == [0.35, 0.5]
    assert entries[0]["psnr_db"][MOREG] is None and entries[0]["gain_db"] is None
    assert entries[0]["psnr_db"][PLAIN] == pytest.approx((38.0 + 41.6) / 2)
    assert (entries[1]["gain_db"], entries[1]["better"]) == (0.0, 0)


def test_rows_with_capped_psnr_are_no_part_of_the_curve():
    capped = {"compute_fraction": [0.5, 0.4], "psnr_db": [100.0, 50.0]}
    assert moreg_report.at_equal_compute([*ROWS, capped], [0, 1], 0.45) == (
        moreg_report.at_equal_compute(ROWS, [0, 1], 0.45)
    )
    assert moreg_report.at_equal_compute([capped], [0, 1], 0.45) is None


def test_the_gain_has_the_standard_error_of_the_differences():
    better = [{**row, "psnr_db": [a + 1, b + 4]} for row in ROWS for a, b in [row["psnr_db"]]]
    entry, _ = moreg_report.compared({PLAIN: ROWS, MOREG: better}, {"all": [0, 1]}, "all", ["all"])
    assert entry["gain_db"] == pytest.approx(2.5)
    assert entry["gain_error_db"] == pytest.approx(math.sqrt(2 * 1.5**2) / math.sqrt(2))
    assert (entry["better"], entry["number"]) == (2, 2)


def test_the_sweep_widens_until_every_fraction_is_passed_and_is_finer_there():
    def measure(scale):
        return [min(1.0, 0.8 / scale), min(1.0, 0.4 / scale)]

    scales = moreg_study.sweep_scales(measure, (0.35, 0.5))
    # 0.8 / scale passes 0.5 and 0.35 at 1.6 and 2.29, 0.4 / scale at 0.8 and 1.14
    root = math.sqrt(2)
    assert scales == pytest.approx([0.25, 0.5, 0.5 * root, 1, root, 2, 2 * root, 4])


def test_the_sweep_ends_where_compute_no_longer_follows_the_scale():
    scales = moreg_study.sweep_scales(lambda scale: [0.4], (0.35, 0.5))
    assert max(scales) == moreg_study.LARGEST_SCALE == 1 / min(scales)


class Maker:
    """Makes clips whose PSNR is 20 dB + 40 dB * compute; MoReg moves compute to fast clips."""

    def __init__(self):
        self.rows = []

    def __call__(self, row):
        self.rows.append(row)
        if row.config is None:
            return Generated(clips())
        scale = row.config.rel_l1_thresh
        shares = (0.4, 0.8, 0.4, 0.8) if row.config.moreg else (0.6,) * 4
        compute = [min(1.0, share / scale) for share in shares]
        errors = torch.tensor([10 ** -((20 + 40 * c) / 20) for c in compute])
        summaries = [SimpleNamespace(compute_fraction=c) for c in compute]
        return Generated(clips() + errors[:, None, None, None, None], summaries)


def study(folder, make):
    config = CacheConfig(use_cache="Ada", codebook="fast")
    return moreg_study.Study(Store(folder), make, steps=30, config=config, moreg_divisor=1.2)


ENTRIES = [{"prompt": f"clip {index}", "seed": index} for index in range(4)]


def test_moving_compute_gains_on_fast_clips_what_it_costs_slow_ones(tmp_path):
    """With PSNR a line over compute, there is nothing to gain at equal compute per half."""
    results = study(tmp_path, Maker()).results(ENTRIES)
    assert [clip["half"] for clip in results["clips"]] == ["slow", "fast", "slow", "fast"]
    for entry in results["per_half"]:
        expected = 20 + 40 * entry["fraction"]
        assert list(entry["psnr_db"]) == [PLAIN, entry["variant"]]
        assert list(entry["psnr_db"].values()) == pytest.approx([expected] * 2, abs=0.01)
        assert entry["gain_db"] == pytest.approx(0, abs=0.01)
    moved = {"fast": 4 / 3, "slow": 2 / 3, "all": 1}
    variants = [entry["variant"] for entry in results["over_all_clips"]]
    assert variants == 6 * [MOREG] + 6 * [RELATIVE_MOREG]
    for entry in results["over_all_clips"]:
        share = moved[entry["clips"]]
        compute = {PLAIN: entry["fraction"], entry["variant"]: share * entry["fraction"]}
        assert entry["compute_fraction"] == pytest.approx(compute, abs=1e-5)
        gain = 40 * (share - 1) * entry["fraction"]
        assert entry["gain_db"] == pytest.approx(gain, abs=0.01)


def test_the_variants_differ_in_moreg_alone(tmp_path):
    make = Maker()
    study(tmp_path, make).results(ENTRIES)
    uncached, *cached = make.rows
    assert uncached.config is None
    assert {row.num_inference_steps for row in make.rows} == {30}
    assert {(row.name, row.config.moreg, row.config.moreg_divisor) for row in cached} == {
        (PLAIN, False, 1.0), (MOREG, True, 1.2), (RELATIVE_MOREG, "relative", 1.0),
    }  # fmt: skip
    assert {row.config.codebook for row in cached} == {"fast"}


def test_a_resumed_study_makes_nothing_again(tmp_path):
    results = study(tmp_path, Maker()).results(ENTRIES)
    make = Maker()
    assert study(tmp_path, make).results(ENTRIES) == results
    assert make.rows == []


def test_the_report_shows_both_readings(tmp_path):
    document = {
        "environment": {"torch": "2.13"},
        "settings": {"model": "m", "split": "test", "num_inference_steps": [30]},
        "moreg_divisor": 1.2,
        **study(tmp_path, Maker()).results(ENTRIES),
    }
    report = moreg_report.render(document)
    for line in (
        "| Ada, MoReg | fast, fast at 0.35 | 0.350 | 0.350 | 34.00 | 34.00 |",
        "| Ada, MoReg | fast, all at 0.35 | 0.350 | 0.467 | 34.00 | 38.67 | +4.67 ± 0.00 |",
        "| Ada, relative MoReg | slow, all at 0.5 | 0.500 | 0.333 | 40.00 | 33.33 | -6.67 ± 0.00",
        " | -6.67 ± 0.00 | 0 of 2 |",
        "| fast | 2 | 0.0350 | 0.0300 to 0.0400 |",
        "| Ada | 1 | 0.600 | 0.600 | 0.600 | 44.00 | 44.00 | 44.00 |",
        "| Ada, MoReg | 1 | 0.800 | 0.400 | 0.600 | 52.00 | 36.00 | 44.00 |",
        "moreg_divisor 1.2",
    ):
        assert line in report


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--moreg_divisor", "0"), "--moreg_divisor: must be above 0, got 0"),
        (("--moreg_divisor", "x"), "--moreg_divisor: invalid float value: 'x'"),
        (("--moreg_divisor", "nan"), "--moreg_divisor: must be above 0, got nan"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_are_told_in_one_line(capfd, tmp_path, arguments, named):
    assert moreg_study.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()
