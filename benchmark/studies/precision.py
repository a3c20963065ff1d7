"""What caching costs in half precision, beside what half precision costs by itself.

Methods run in several weights' types; each is compared with the uncached pictures of its own type,
and with those of float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_documented
from benchmark.models.names import UNCACHED
from benchmark.report.page import page
from benchmark.report.tables import MISSING, Table, number
from benchmark.run.rows import comparison_rows
from benchmark.run.workbench import Workbench
from benchmark.score.pictures import spread
from benchmark.settings import Settings
from benchmark.studies.catalogue import PrecisionOptions
from benchmark.studies.session import opened

EXACT = "float32"


def measure(
    store: Any,
    rows: Sequence[Any],
    dtypes: Sequence[str],
    make: Callable[[str, Any], Any],
    psnr: Callable[[Any, Any], list[float]],
) -> list[dict[str, Any]]:
    """Compute fraction, and PSNR to both uncached runs, of every row in every type.

    The first row is the uncached one, the first type float32; ``make(dtype, row)`` makes pictures,
    `generate.Generated`. Every row is kept as soon as it is finished.
    """
    uncached = rows[0]

    def found(dtype: str, row: Any) -> dict[str, Any]:
        made = make(dtype, row)
        if row is uncached:
            store.save_pictures(f"{dtype}-{row.key}", made.pictures)
        own, exact = (store.pictures(f"{of}-{uncached.key}") for of in (dtype, dtypes[0]))
        is_exact = row is uncached and dtype == dtypes[0]
        fractions = [summary.compute_fraction for summary in made.summaries]
        return {
            "dtype": dtype,
            "cache_method": row.name,
            "compute_fraction": round(fmean(fractions), 6) if fractions else 1.0,
            "psnr_db": None if row is uncached else spread(psnr(made.pictures, own)),
            "psnr_exact_db": None if is_exact else spread(psnr(made.pictures, exact)),
            "config": row.config and row.config.to_dict(),
        }

    pairs = product(dtypes, rows)
    return [store.kept_row(f"{d}-{row.key}", partial(found, d, row)) for d, row in pairs]


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line a type and method."""

    def psnr(value: Mapping[str, float] | None) -> str:
        return MISSING if value is None else f"{value['mean']:.1f} (min {value['min']:.1f})"

    heads = ("type", "method", "compute", "PSNR dB to its uncached", f"to {EXACT} uncached")
    cells = [
        (
            result["dtype"],
            "uncached" if result["cache_method"] == UNCACHED else result["cache_method"],
            number(result["compute_fraction"], 3),
            psnr(result["psnr_db"]),
            psnr(result["psnr_exact_db"]),
        )
        for result in results
    ]
    return Table("Caching in half precision", heads, cells)


NOTES = (
    "PSNR: mean and minimum over the pictures, against the uncached picture of the same type and "
    "against that of float32. The uncached line of the half precision type is what the type costs "
    "by itself.",
)


def tables(document: Mapping[str, Any]) -> list[Table]:
    return [table(document["results"])]


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    return page(document, "Caching in half precision", tables(document), NOTES)


def run(settings: Settings, options: PrecisionOptions, console: Console) -> None:
    """Make all pictures, then write ``results.json`` and ``report.md``."""
    rows = comparison_rows(
        settings.cache_methods,
        settings.num_inference_steps[:1],
        load_documented(settings),
        {},
        FAMILIES[settings.model_type].solvers,
    )
    with opened(settings, console, {"half": options.half}) as session:
        bench = session.bench
        benches = {EXACT: bench, options.half: Workbench(replace(settings, dtype=options.half))}

        def make(dtype: str, row: Any) -> Any:
            return session.make(row, benches[dtype], said=f"{dtype} {row.name}")

        found = {
            "settings": {**settings.to_dict(), "dtype": list(benches)},
            "prompts": bench.entries,
            "results": measure(bench.store, rows, list(benches), make, session.psnr),
        }
    session.write(found, render, tables)
