"""Whether `Auto` holds the compute budget that it is given, on every picture."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmark.models.families import FAMILIES
from benchmark.report.page import page
from benchmark.report.tables import Table
from benchmark.run.rows import Row, cached_row
from benchmark.settings import Settings
from benchmark.studies.catalogue import BudgetOptions
from benchmark.studies.session import compared_pictures, kept_pictures, opened
from xfuser_adacorr import CacheConfig

Result = Mapping[str, Any]
"""Of one budget: ``target_compute``, and per picture ``compute_fraction`` and ``psnr_db``."""


def measure(
    store: Any,
    uncached: Row,
    rows: Sequence[Row],
    make: Callable[[Row], Any],
    psnr: Callable[[Any, Any], list[float]],
) -> list[Result]:
    """`Result` of every row, each kept as soon as it is finished.

    ``make(row)`` makes pictures, `generate.Generated`. The compute fraction is the package's own
    count of computed calls, which is what it steers.
    """
    reference = kept_pictures(store, uncached, make)

    def found(row: Row) -> Result:
        target = {"target_compute": row.config.to_dict()["target_compute"]}
        return target | compared_pictures(row, make(row), reference, psnr)

    return [store.kept_row(row.key, partial(found, row)) for row in rows]


def off_target(result: Result, steps: int) -> float:
    """Largest deviation of a picture's computed steps from the steps asked for, signed.

    A run has whole steps alone: below half a step in size the budget is held.
    """
    asked = result["target_compute"] * steps
    return max((x * steps - asked for x in result["compute_fraction"]), key=abs)


def budgets_table(results: Sequence[Result], steps: int) -> Table:
    """One line a budget."""
    cells = []
    for result in results:
        fractions, off = result["compute_fraction"], off_target(result, steps)
        held = "held" if abs(off) <= 0.5 else "not held"
        cells.append(
            (
                f"{result['target_compute']:g}",
                f"{fmean(fractions):.3f} ({min(fractions):.3f}-{max(fractions):.3f})",
                f"{off:+.1f} steps, {held}",
                f"{fmean(result['psnr_db']):.1f} ({min(result['psnr_db']):.1f})",
            )
        )
    heads = ("budget", "compute (range)", "largest deviation", "PSNR dB (least)")
    return Table("Compute budgets", heads, cells)


NOTES = (
    "Compute: computed calls over all calls, mean and range over the pictures. Largest deviation: "
    "of any picture from the budget. A run has whole steps alone, so that half a step is as near "
    "as can be.",
    "PSNR: against the uncached picture (of clips the mean over frames), mean and least over the "
    "pictures.",
)


def tables(document: Mapping[str, Any]) -> list[Table]:
    return [budgets_table(document["results"], document["settings"]["num_inference_steps"][0])]


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    return page(document, "Compute budgets of `Auto`", tables(document), NOTES)


def run(settings: Settings, options: BudgetOptions, console: Console) -> None:
    """Make all pictures, then write ``results.json`` and ``report.md``."""
    steps, solver = settings.num_inference_steps[0], FAMILIES[settings.model_type].solvers[0]
    rows = [
        cached_row(
            "Auto",
            steps,
            CacheConfig.from_name("Auto", target_compute=budget, use_plan=False),
            solver,
        )
        for budget in options.budgets
    ]
    with opened(settings, console, {"budgets": options.budgets}) as session:
        bench = session.bench
        uncached = bench.uncached_row(steps)
        found = {
            "prompts": bench.entries,
            "results": measure(bench.store, uncached, rows, session.make, session.psnr),
        }
    session.write(found, render, tables)
