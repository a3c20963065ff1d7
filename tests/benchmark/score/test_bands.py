"""Curves with confidence bands: the bootstrap, fronts and interpolation."""

import pytest
import torch

from benchmark.score.bands import QUANTITIES, Point, best_curve, curve, point_at
from benchmark.score.pictures import frechet_distance
from benchmark.score.samples import RESAMPLES, draws, resampled_distances
from benchmark.studies import pareto_report

PSNR, ACCURACY = QUANTITIES[0], QUANTITIES[-1]


def result(compute, values, method="Auto", **more):
    return {
        "cache_method": method,
        "compute_fraction": compute,
        "samples": {"psnr": values},
        **more,
    }


def plain(x, value):
    return Point(x, value, torch.full((RESAMPLES,), float(value)))


def test_resamples_are_the_same_for_every_row_and_draw_with_repetition():
    assert torch.equal(draws(7), draws(7))
    assert draws(7).shape == (RESAMPLES, 7)
    assert any(len(set(draw.tolist())) < 7 for draw in draws(7))


def test_resampled_distances_are_those_of_the_resampled_pictures():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, generator=generator)
    reference = torch.randn(50, 6, generator=generator) * 2 + 1
    expected = [frechet_distance(features[draw], reference) for draw in draws(20)[:5]]
    assert resampled_distances(features, reference)[:5].tolist() == pytest.approx(expected)


def test_a_band_is_the_percentiles_of_the_resampled_means():
    values = torch.tensor([30.0, 34.0, 41.0, 29.0, 50.0])
    (point,) = curve([result(0.5, values.tolist())], PSNR)
    means = sorted(float(values[draw].mean()) for draw in draws(5))
    assert point.value == pytest.approx(float(values.mean()))
    low, high = point.band()
    assert means[9] <= low <= means[10]  # 2.5 % of 400 resamples lie below
    assert means[-11] <= high <= means[-10]


def test_a_difference_is_taken_on_the_same_pictures():
    values = [30.0, 34.0, 41.0, 29.0, 50.0]
    (a,) = curve([result(0.5, [v + 2 for v in values])], PSNR)
    (b,) = curve([result(0.5, values)], PSNR)
    assert a.band()[0] < b.band()[1]  # the methods' own bands overlap
    assert a.minus(b).band() == (pytest.approx(2), pytest.approx(2))


def test_settings_that_others_beat_at_less_compute_are_left_out():
    values = [(0.2, 30), (0.3, 29), (0.4, 35), (0.4, 33), (0.6, 35)]
    rows = [result(x, [float(value)] * 2, "Fb") for x, value in values]
    points = best_curve(rows, PSNR)
    assert [(p.x, p.value) for p in points] == [(0.2, 30), (0.4, 35), (0.6, 35)]


def test_other_quantities_are_read_from_the_settings_that_psnr_chose():
    def row(x, psnr, accuracy):
        row = result(x, [psnr] * 2, "Fb")
        row["samples"]["prompt_accuracy"] = [accuracy] * 2
        return row

    points = best_curve([row(0.2, 30.0, 1.0), row(0.3, 29.0, 1.0), row(0.4, 35.0, 0.5)], ACCURACY)
    assert [(p.x, p.value) for p in points] == [(0.2, 1.0), (0.4, 0.5)]


def test_values_between_points_are_interpolated_and_outside_missing():
    points = [plain(0.2, 30), plain(0.4, 40)]
    between = point_at(points, 0.35)
    assert between.value == pytest.approx(37.5)
    assert between.resampled.tolist() == pytest.approx([37.5] * RESAMPLES)
    assert point_at(points, 0.4).value == 40
    assert point_at(points, 0.41) is None


def test_auto_is_not_given_the_better_of_its_settings_but_its_rivals_are():
    rows = [result(0.3, [40.0, 40.0]), result(0.4, [30.0, 30.0])]
    assert [p.value for p in pareto_report.method_curve("Auto", rows, PSNR)] == [40, 30]
    assert [p.value for p in pareto_report.method_curve("Fb", rows, PSNR)] == [40, 40]


def test_the_table_says_who_wins_by_how_much():
    auto = [result(x, [40.0, 44.0, 42.0]) for x in (0.2, 0.6)]
    weak = [result(x, [30.0, 34.0, 32.0], "Fb") for x in (0.2, 0.6)]
    even = [result(x, [45.0, 39.0, 41.5], "Tea") for x in (0.2, 0.6)]
    entries = pareto_report.at_fractions([*auto, *weak, *even])
    at = {(e["cache_method"], e["at"]): e for e in entries if e["quantity"] == "psnr"}
    assert at["Fb", 0.35]["auto_gains"] == {"value": 10.0, "low": 10.0, "high": 10.0}
    assert pareto_report.verdict(at["Fb", 0.35]["auto_gains"]) == "Auto"
    assert pareto_report.verdict(at["Tea", 0.35]["auto_gains"]) == "even"
    assert at["Auto", 0.35]["auto_gains"] is None
    summary, psnr = pareto_report.tables(entries, 28)
    assert summary.cells[0][1].startswith("even: +0.2 [") and summary.cells[0][1].endswith("Tea")
    assert dict((cells[0], cells[1]) for cells in psnr.cells)["Fb"] == "32.0 [30.0, 34.0]"


def test_a_lower_distance_is_a_gain():
    def row(method, distance):
        samples = {"psnr": [30.0], "judge_distance": [distance + 1.0] * RESAMPLES}
        return {**result(0.25, [], method), "judge_distance": distance, "samples": samples}

    entries = pareto_report.at_fractions([row("Auto", 3.0), row("Fb", 5.0)])
    named = ("judge_distance", "Fb", 0.25)
    (entry,) = (e for e in entries if (e["quantity"], e["cache_method"], e["at"]) == named)
    assert entry["auto_gains"] == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_at_equal_time_methods_are_read_where_they_take_the_same_share_of_the_uncached_run():
    def row(seconds, value, method):
        return result(0.5, [value, value], method, latency_s={"median": seconds})

    rows = [
        row(12.0, 100.0, "None"),
        *(row(seconds, 10 * seconds, "Auto") for seconds in (3.5, 4.5, 6.0)),
        *(row(seconds, value, "Fb") for seconds, value in ((2.0, 20.0), (4.0, 15.0), (5.0, 30.0))),
    ]
    table = pareto_report.equal_time(rows, 28)
    assert table.heads == ("method", "2 times as fast", "3 times as fast", "4 times as fast")
    auto, fb = table.cells
    assert auto == ("Auto", "60.0 [60.0, 60.0]", "40.0 [40.0, 40.0]", "-")
    assert fb == ("Fb", "-", "26.7 [26.7, 26.7]", "23.3 [23.3, 23.3]")
