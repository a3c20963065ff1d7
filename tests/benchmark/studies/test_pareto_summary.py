"""The tables of the Pareto runs: who counts as what, and what stands in the cells."""

import json

import pytest

from benchmark.errors import BenchmarkError
from benchmark.report.markers import PAGE
from benchmark.studies import pareto_report, pareto_summary
from benchmark.studies.catalogue import RESULTS
from tests.benchmark.tiny import run_study

PSNR = {
    "Auto": (40.0, 50.0, 60.0),
    "Learned": (45.0, 55.0, 65.0),
    "Fast": (30.0, 31.0, 32.0),
    "Fast+AdaCorrection": (41.0, 49.0, 59.0),
    "Schedule, forecast": (38.0, None, 55.0),
    "Schedule": (33.0, 51.0, 34.0),
    "Schedule+AdaCorrection": (39.0, 52.0, 58.0),
    "diffusers:TaylorSeer": (None, 45.0, 57.0),
    "cache-dit:DBCache": (35.0, 36.0, 57.5),
    "paper:OLSS": (37.5, 44.0, None),
    "Euler, fewer steps": (36.0, 37.0, 38.0),
    "uncached": (None, None, None),
}
AT = (0.25, 0.35, 0.5)


def document(name="flux", timed=True):
    entries = []
    for method, values in PSNR.items():
        for at, value, own in zip(AT, values, PSNR["Auto"], strict=True):
            gain = None
            if value is not None and method != "Auto":
                gain = {"value": own - value, "low": own - value - 3, "high": own - value + 3}
            for quantity in ("psnr", "psnr_ode", "ssim"):
                entry = {"quantity": quantity, "at": at, "cache_method": method}
                entries.append({**entry, "value": value, "auto_gains": gain and dict(gain)})
    rows = [
        {
            "cache_method": "None" if method == "uncached" else method,
            "reference_steps": 28,
            "compute_fraction": at,
            "psnr_db": None if value is None else {"mean": value},
            "psnr_per_picture": value and [value - 11, value + 1, value + 10],
            "latency_s": {"median": 12.0 if value is None else 20 * at - 1} if timed else None,
        }
        for method, values in PSNR.items()
        for at, value in zip(AT, values, strict=True)
        if method != "uncached" or at == AT[0]
    ]
    return {"settings": {"model_type": name}, "results": rows, "at_fractions": entries}


def column(table, head):
    return [cells[table.heads.index(head)] for cells in table.cells]


def test_each_cell_has_the_best_of_its_kind_and_gains_are_over_all_without_adacorrection():
    table = pareto_summary.summary_table([document()], "psnr")
    assert {head: column(table, head) for head in table.heads} == {
        "run": ["flux, 28 steps"] * 3,
        "compute": ["0.25", "0.35", "0.5"],
        "Auto": ["40.0", "50.0", "60.0"],
        "Learned": ["45.0", "55.0", "65.0"],
        "Auto, learn=1": ["-"] * 3,
        "bases + AdaCorrection": ["41.0", "49.0", "59.0"],
        "searched schedule + AdaCorrection": ["39.0", "52.0", "58.0"],
        "searched schedule": ["38.0", "51.0", "55.0"],
        "other projects": ["35.0", "45.0", "57.5"],
        "methods of papers": ["37.5", "44.0", "-"],
        "bases": ["30.0", "31.0", "32.0"],
        "fewer steps": ["36.0", "37.0", "38.0"],
        # over the searched forecast, the searched reuse and DBCache; all bands are 3 dB wide
        "Auto gains": ["(+2.0)", "(-1.0)", "(+2.5)"],
    }


def test_a_gain_whose_band_excludes_0_has_no_brackets():
    content = document()
    for entry in content["at_fractions"]:
        if entry["auto_gains"]:
            entry["auto_gains"]["low"] += 2.5
    table = pareto_summary.summary_table([content], "psnr")
    assert column(table, "Auto gains") == ["+2.0", "(-1.0)", "+2.5"]


def test_base_methods_stand_beside_their_corrections():
    table = pareto_summary.corrections_table([document(), document("dit")])
    assert table.heads[-4:] == ("Fast", "Fast+AdaCorrection", "Ada", "Ada+AdaCorrection")
    assert column(table, "run") == ["flux, 28 steps"] * 3 + ["dit, 28 steps"] * 3
    assert column(table, "Fast") == ["30.0", "31.0", "32.0"] * 2
    assert column(table, "Fast+AdaCorrection") == ["41.0", "49.0", "59.0"] * 2
    assert column(table, "Ada") == ["-"] * 6  # not in these runs


def test_runs_without_base_methods_have_no_rows_among_the_corrections():
    without = document("sd")
    bases = ("Fast", "Fast+AdaCorrection")
    entries = without["at_fractions"]
    without["at_fractions"] = [e for e in entries if e["cache_method"] not in bases]
    table = pareto_summary.corrections_table([without, document()])
    assert column(table, "run") == ["flux, 28 steps"] * 3


def test_the_envelope_drops_rows_that_less_compute_beats():
    rows = [r for r in document()["results"] if r["cache_method"].startswith("Schedule")]
    rows = [row for row in rows if row["cache_method"] != "Schedule+AdaCorrection"]
    found = pareto_summary.points(rows, pareto_summary.mean_psnr)
    assert found == [(0.25, 33.0), (0.25, 38.0), (0.35, 51.0), (0.5, 34.0), (0.5, 55.0)]
    assert pareto_summary.upper_envelope(found) == [(0.25, 38.0), (0.35, 51.0), (0.5, 55.0)]
    lone = [row for row in rows if row["cache_method"] == "Schedule"]
    found = pareto_summary.points(lone, pareto_summary.mean_psnr)
    assert pareto_summary.upper_envelope(found) == [(0.25, 33.0), (0.35, 51.0)]
    assert pareto_summary.best_up_to(found) == [(0.25, 33.0), (0.35, 51.0), (0.5, 51.0)]
    assert pareto_summary.best_up_to([]) == []
    assert pareto_summary.within_shown([(0.1, 1.0), (0.2, 2.0), (0.7, 3.0)]) == [(0.2, 2.0)]


def test_the_median_picture_is_that_of_the_best_settings():
    table = pareto_summary.median_table([document()])
    assert column(table, "Auto") == ["41.0", "51.0", "61.0"]
    assert column(table, "searched schedule") == ["39.0", "52.0", "56.0"]  # at 0.5 the forecast's
    assert column(table, "fewer steps") == ["37.0", "38.0", "39.0"]


def test_equal_numbers_of_computed_steps_are_read_at_their_share_of_the_run():
    long = document("dit")
    for row in long["results"]:
        row["reference_steps"] = 50
    table = pareto_summary.computed_steps_table([document(), long])
    assert column(table, "run") == ["flux, 28 steps"] * 3
    assert column(table, "computed steps") == ["5", "7", "10"]
    # below all points; on the first one; 10 of 28 are 1/21 of the way from 0.35 to 0.5
    assert column(table, "Auto") == ["-", "40.0", "50.5"]
    assert column(table, "methods of papers") == ["-", "37.5", "-"]


def test_equal_time_is_read_at_a_share_of_the_uncached_seconds_from_the_runs_that_were_timed():
    content = document()
    assert pareto_report.SPEEDUPS == (2, 3, 4)
    table = pareto_summary.time_table([content, document("dit", timed=False)])
    # 4, 6 and 9 seconds stand at the three fractions; read at 6, 4 and 3 of the uncached 12
    assert column(table, "speed") == ["2x", "3x", "4x"]
    assert column(table, "Auto") == ["50.0", "40.0", "-"]
    assert column(table, "searched schedule") == ["51.0", "38.0", "-"]


def test_the_page_gets_its_tables_and_the_figure_is_drawn(tmp_path):
    for name in ("flux", "dit"):
        (tmp_path / f"pareto_{name}_28.json").write_text(json.dumps(document(name)))
    page = tmp_path / "results.md"
    page.write_text(
        "a\n<!-- pareto psnr -->\n<!-- end -->\nb\n<!-- pareto psnr_ode -->\nx\n<!-- end -->\n"
        "<!-- pareto computed steps -->\n<!-- end -->\n"
        "<!-- pareto median -->\n<!-- end -->\n<!-- pareto corrections -->\n<!-- end -->\n"
        "<!-- pareto time -->\n<!-- end -->\nc\n"
    )
    for _ in range(2):
        pareto_summary.update_results(page, tmp_path)
        text = page.read_text()
        table = pareto_summary.summary_table([document(), document("dit")], "psnr").markdown()
        assert text.startswith(f"a\n<!-- pareto psnr -->\n\n{table}\n<!-- end -->\nb\n")
        assert text.count("| flux, 28 steps |") == 18 and text.endswith("<!-- end -->\nc\n")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_the_page_cannot_be_updated(tmp_path):
    with pytest.raises(BenchmarkError, match="--update_results: no pareto_FAMILY_STEPS"):
        pareto_summary.update_results(PAGE, tmp_path)
    assert run_study("pareto", "--update_results", "--results_dir", tmp_path) == 2


def test_the_committed_page_has_the_committed_results(tmp_path):
    copy, text = tmp_path / "results.md", PAGE.read_text("utf-8")
    documents = pareto_summary.read_documents(RESULTS)
    copy.write_text(text, "utf-8")
    pareto_summary.put_tables(copy, documents)
    assert copy.read_text("utf-8") == text
