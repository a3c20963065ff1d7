"""The paper's table: its rows, equal compute, batches that are kept."""

import json

import pytest

from benchmark.cli import read
from benchmark.studies import paper_table
from benchmark.studies.catalogue import STUDIES
from tests.benchmark.tiny import TINY, run_study


def asked(**options):
    given = [x for k, v in options.items() for x in (f"--{k}", *map(str, v))]
    settings, own = read(STUDIES["paper_table"], [*given, "--num_inference_steps", "28"])
    return paper_table.asked_rows(settings, own)


def test_the_papers_rows_are_plain_and_corrected():
    rows = asked(groups=["table"])
    names = [row.label for row in rows]
    pairs = [name for base in paper_table.PAPER for name in (base, f"{base}+AdaCorrection")]
    assert names == [*pairs, "Auto", "Learned"]
    assert all(row.like == row.label.removesuffix("+AdaCorrection") for row in rows[1:10:2])
    assert {row.group for row in asked()} == {"table", "modules", "rivals", "sensitivity"}


def test_samples_beyond_the_prompts_have_seeds_of_their_own():
    entries = [{"class_label": "a", "seed": 1}, {"class_label": "b", "seed": 2}]
    made = paper_table.sample_entries(entries, 5)
    assert [entry["class_label"] for entry in made] == ["a", "b", "a", "b", "a"]
    assert made[:2] == entries and len({entry["seed"] for entry in made}) == 5


def test_the_command_makes_what_is_missing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_table, "PAPER", ("Fb",))
    monkeypatch.setattr(paper_table, "MODULES", (("FORA", {"interval": 2}),))
    pipe, pipe.transformer = TINY["dit"]()
    pipe.save_pretrained(tmp_path / "dit")
    arguments = ["--model_type", "dit", "--model", tmp_path / "dit", "--judge", models / "judge"]
    arguments += ["--num_inference_steps", 4, "--batch_size", 2, "--groups", "table", "modules"]
    output = tmp_path / "out"
    assert run_study("paper_table", *arguments, "--samples", 2, "--output_dir", output) == 0
    document = json.loads((output / "results.json").read_text())
    rows = {row["row"]: row for row in document["results"]}
    assert {"uncached", "Fb", "Fb+AdaCorrection", "Auto", "FORA interval 2"} <= set(rows)
    plain, corrected = rows["FORA interval 2"], rows["FORA interval 2+AdaCorrection"]
    assert plain["compute_fraction"] == pytest.approx(0.75)  # the first step, and every second
    assert corrected["config"]["target_compute"] == pytest.approx(0.75)
    assert "Learned" in document["left_out"]  # it has no plan
    made = []
    make = paper_table.make_batch
    monkeypatch.setattr(paper_table, "make_batch", lambda *a: made.append(a[1].name) or make(*a))
    more = [*arguments, "--samples", 4, "--output_dir", output, "--resume"]
    assert run_study("paper_table", *more) == 0
    assert len([name for name in made if name != "Learned"]) == len(rows)  # one batch each
    assert json.loads((output / "results.json").read_text())["samples"] == 4
