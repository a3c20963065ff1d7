"""The script that writes docs/models.md, on two classes."""

from scripts.model_table import Row, page, row, transformer_classes
from tests.tiny_models import MODELS

STACK = ("Fb", "Tea", "Ada", "Fast")


def test_a_row_says_what_runs(own_registry):
    found = row("WanTransformer3DModel", {"WanTransformer3DModel": "yes"})
    assert found == Row("WanTransformer3DModel", dict.fromkeys(("Sampler step", *STACK), "yes"))


def test_a_row_says_why_something_does_not_run(own_registry):
    found = row("TransformerTemporalModel", {})
    assert found.results["Sampler step"] == "not tried"
    assert {found.results[m] for m in STACK} == {"a part of U-Nets, which no sampling loop calls"}


def test_every_reason_is_written_once_below_the_table():
    rows = [
        Row("A", {"Fb": "yes", "Tea": "it broke"}),
        Row("B", {"Fb": "too small", "Tea": "it broke"}),
    ]
    assert page(rows).splitlines() == [
        "| class | Fb | Tea |",
        "|---|---|---|",
        "| `A` | yes | no [1] |",
        "| `B` | no [2] | no [1] |",
        "",
        "1. it broke",
        "2. too small",
    ]


def test_the_table_has_every_class_that_there_is_a_tiny_model_of():
    assert set(MODELS) <= set(transformer_classes())
