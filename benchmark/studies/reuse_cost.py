"""Time of a reused denoiser call as a share of a computed one, for every method, in one run.

Uncached and cached generations take turns; each call is timed alone, together with the scheduler's
step after it, with the accelerator drained, and told apart by the trace.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from tqdm.auto import tqdm

from benchmark.gpu.probes import timed_calls
from benchmark.models.loading import load_documented
from benchmark.models.names import LEARNED, UNCACHED
from benchmark.models.package import computed_calls
from benchmark.report.page import page
from benchmark.report.tables import Table
from benchmark.run.generate import make_picture, prepared
from benchmark.run.rows import Row, cached_row, uncached_row
from benchmark.run.sweep import learned_rows
from benchmark.run.workbench import Workbench
from benchmark.settings import Settings
from benchmark.studies.session import opened
from xfuser_adacorr import cache_summary


def time_calls(bench: Workbench, row: Row) -> dict[str, list[float]]:
    """Seconds of the computed and of the reused calls of one generation."""
    pipe, steps = bench.pipe, row.num_inference_steps
    with prepared(pipe, row):
        with timed_calls(pipe) as seconds:
            make_picture(pipe, bench.settings, bench.entries[0], steps)
        if row.is_reference:
            return {"full": seconds, "reused": []}
        computed = computed_calls(cache_summary(pipe))
    shares = list(zip(computed, seconds, strict=True))
    return {
        "full": [s for is_computed, s in shares if is_computed],
        "reused": [s for is_computed, s in shares if not is_computed],
    }


def measure(bench: Workbench, rows: list[Row]) -> dict[str, Any]:
    """Median and quartiles of a reused call over the median uncached call, per method."""
    seconds: dict[str, dict[str, list[float]]] = {
        row.name: {"full": [], "reused": []} for row in rows
    }
    for turn in tqdm(range(bench.settings.repetitions + 1), desc="rounds"):
        for row in rows:
            timed = time_calls(bench, row)
            if turn > 0:  # the first round warms up
                for kind in timed:
                    seconds[row.name][kind] += timed[kind]
    full = median(seconds[UNCACHED]["full"])
    methods = {}
    for name, timed in seconds.items():
        if timed["reused"]:
            quartiles = np.quantile(timed["reused"], (0.25, 0.5, 0.75), method="weibull") / full
            shares = dict(zip(("q1", "median", "q3"), quartiles.tolist(), strict=True))
            methods[name] = {"calls": len(timed["reused"]), "share_of_full_call": shares}
    return {"full_call_s": full, "methods": methods}


def table(found: Mapping[str, Any]) -> Table:
    """One line a method."""
    cells = []
    for name, entry in found["methods"].items():
        share = {quartile: f"{100 * x:.2f}" for quartile, x in entry["share_of_full_call"].items()}
        spread = f"{share['q1']} to {share['q3']} %"
        cells.append((name, f"{share['median']} %", spread, str(entry["calls"])))
    title = f"Computed call: {1e3 * found['full_call_s']:.2f} ms"
    return Table(title, ("method", "reused call / computed call", "quartiles", "calls"), cells)


NOTES = (
    "A call is timed together with the scheduler's step after it, uncached and cached generations "
    "by turns in one run.",
)


def tables(document: Mapping[str, Any]) -> list[Table]:
    return [table(document)]


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    return page(document, "What a reused call costs", tables(document), NOTES)


def timed_rows(settings: Settings, solver: str) -> list[Row]:
    """Uncached, the methods of the configuration file, and the middle budget of the learned plan
    beside the model, where it has one for these steps."""
    steps = settings.num_inference_steps[0]
    documented = load_documented(settings).items()
    rows = [cached_row(name, steps, config, solver) for name, config in documented]
    plan = learned_rows([LEARNED], Path(settings.model), steps, settings.guidance_scale, solver)
    return [uncached_row(steps, solver), *rows, *plan[len(plan) // 2 :][:1]]


def run(settings: Settings, console: Console) -> None:
    """Time the methods of the configuration file, then write the report."""
    with opened(settings, console, {}) as session:
        rows = timed_rows(settings, session.bench.family.solvers[0])
        found = measure(session.bench, rows)
    session.write({"prompts": session.bench.entries[:1], **found}, render, tables)
