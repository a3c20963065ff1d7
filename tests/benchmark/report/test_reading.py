"""Results of earlier versions under the names of this one."""

import pytest

from benchmark.report.comparison import render
from benchmark.report.reading import modernised, read_results
from benchmark.report.tables import comparison_tables, sweep_tables
from benchmark.run.store import read_json
from benchmark.studies.catalogue import RESULTS

COMPARISONS = sorted((RESULTS / "cross_model").glob("*/results.json"))
JUDGED, INCEPTION = "features of the small classifier", "features of Inception v3"
ROW = {"fid": 3163.3, "fid_std": 20.0, "compute_fraction": 0.35, "total_compute_fraction": 0.36}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.parent.name)
def test_committed_comparisons_show_their_fid_as_the_judges_distance(path):
    document, old = read_results(path), read_json(path)
    assert len(document["results"]) == len(old["results"])
    for row, before in zip(document["results"], old["results"], strict=True):
        assert "fid" not in row and row["judge_distance"] == before["fid"]
    tables = comparison_tables(document["results"])
    assert all("judge distance" in table.heads and "FID" not in table.heads for table in tables)
    report = render(document, tables, {})
    assert "Judge distance: Fréchet distance of features of the small classifier" in report
    assert "FID" not in report


def test_committed_curves_keep_their_quantities():
    document = read_results(RESULTS / "pareto_flux_50.json")
    quantities = {entry["quantity"] for entry in document["at_fractions"]}
    assert "judge_distance" in quantities and "fid" not in quantities
    old = read_json(RESULTS / "pareto_flux_50.json")["results"]
    for row, before in zip(document["results"], old, strict=True):
        assert row["compute_fraction"] == before["total_compute_fraction"]
    (table,) = sweep_tables(document["results"])
    assert "judge distance" in table.heads


def test_the_name_stays_where_the_network_was_inception():
    judged, published = (
        modernised({"fid": described, "results": [ROW]}) for described in (JUDGED, INCEPTION)
    )
    assert judged["distance"] == JUDGED and published["distance"] == INCEPTION
    assert judged["results"] == [
        {"judge_distance": 3163.3, "judge_distance_std": 20.0, "compute_fraction": 0.36}
    ]
    assert published["results"] == [{"fid": 3163.3, "fid_std": 20.0, "compute_fraction": 0.36}]


def test_a_document_of_this_version_stays_as_it_is():
    document = {"distance": JUDGED, "results": [{"judge_distance": 1.0, "compute_fraction": 0.4}]}
    assert modernised(document) == document
