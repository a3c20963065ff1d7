"""Quality over compute of our methods, other projects' and fewer steps.

One run sweeps every method over its knob, scores each row picture by picture against the uncached
run and the converged ODE, and writes a report for every number of steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_documented
from benchmark.models.names import (
    CORRECTED,
    LEARNED,
    LEARNING,
    METHOD_NAMES,
    SCHEDULE,
    SCHEDULES,
    UNCACHED,
)
from benchmark.peers import available
from benchmark.report.comparison import gather
from benchmark.report.markers import PAGE
from benchmark.run.generate import prepared
from benchmark.run.rows import Row
from benchmark.run.store import Store
from benchmark.run.sweep import SWEEPS, learned_rows, schedule_budgets, sweep_rows
from benchmark.run.tuning import Tuner
from benchmark.run.workbench import Workbench, measure_latencies, run_rows
from benchmark.settings import Settings
from benchmark.studies.catalogue import ParetoOptions
from benchmark.studies.pareto_report import write_report
from benchmark.studies.pareto_summary import update_results
from benchmark.studies.session import run_identity

TUNING = ("tuning_prompts", "search_evaluations")
STAND_INS = {
    SCHEDULE: {SCHEDULE: "reuse", f"{SCHEDULE}, forecast": "forecast"},
    SCHEDULE + CORRECTED: {SCHEDULE + CORRECTED: "adacorrection"},
}
"""Method -> the rows' names and what stands in for their skipped calls."""


def pareto_settings(
    settings: Settings, methods: Sequence[str] | None
) -> tuple[Settings, list[str]]:
    """The run, and what is said of methods that are left out; `BenchmarkError` for a mistake."""
    left_out: list[str] = []
    if methods is None:
        peers, left_out = available(settings.model_type, true_cfg=settings.true_cfg_scale > 1)
        methods = [*METHOD_NAMES, *SCHEDULES, LEARNED, LEARNING, *peers]
    wanted = tuple(name for name in methods if name != UNCACHED)
    chosen = replace(settings, mode="pareto", cache_methods=wanted, ode_reference=True)
    return chosen, left_out


def swept_rows(settings: Settings, steps: int) -> list[Row]:
    """All rows but those that have to be searched, tuned to nothing yet."""
    methods = [name for name in settings.cache_methods if name not in SCHEDULES]
    solvers = FAMILIES[settings.model_type].solvers
    documented, sweeps = load_documented(settings), SWEEPS[settings.model_type]
    model, scale = Path(settings.model), settings.guidance_scale
    return [
        *sweep_rows(methods, [steps], documented, {}, solvers, sweeps),
        *learned_rows(methods, model, steps, scale, solvers[0]),
    ]


def without_plan(settings: Settings, rows: Sequence[Row], steps: int) -> list[str]:
    """What is said where `LEARNED` is wanted and has no rows."""
    if LEARNED not in settings.cache_methods or any(row.name == LEARNED for row in rows):
        return []
    return [f"{LEARNED}: no plan for {steps} steps beside {settings.model}"]


def searched_rows(settings: Settings, steps: int, tuner: Tuner, console: Console) -> list[Row]:
    """A searched schedule for every stand-in and budget."""
    rows = []
    for method in (name for name in settings.cache_methods if name in SCHEDULES):
        for name, stand_in in STAND_INS[method].items():
            for computed in schedule_budgets(steps):
                console.print(f"{name}: searching {computed} of {steps} steps")
                rows.append(tuner.searched_row(name, stand_in, steps, computed))
    return rows


def identity(settings: Settings, tuning: Mapping[str, int]) -> dict[str, Any]:
    """What has to be the same for finished rows to be used again; other methods may be added."""
    content = run_identity(settings)
    for name in ("cache_methods", "num_inference_steps", "repetitions", "warmup"):
        del content[name]
    return {**content, **tuning}


def run(settings: Settings, options: ParetoOptions, console: Console) -> None:
    """Sweep, tune, score and report; raises `BenchmarkError` before anything is written."""
    if options.update_results:
        update_results(PAGE, options.results_dir)
        return
    settings, left_out = pareto_settings(settings, options.methods)
    tuning = {name: getattr(options, name) for name in TUNING}
    store = Store(settings.output_dir)
    store.check(settings.resume)
    swept = {steps: swept_rows(settings, steps) for steps in settings.num_inference_steps}
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    for rows in swept.values():
        for row in {row.name: row for row in rows}.values():
            with prepared(bench.pipe, row):
                pass  # what cannot be enabled is said before anything is written
    store.open(identity(settings, tuning), settings.resume)
    tuner = Tuner(bench, options.tuning_prompts, options.search_evaluations)
    tuned, furthers = {}, {}
    for steps, rows in swept.items():
        missing = without_plan(settings, rows, steps)
        further = {"tuning": tuning, "left_out": [*left_out, *missing]}
        furthers[steps] = further
        tuned[steps] = [tuner.tuned(row) for row in rows]
        tuned[steps] += searched_rows(settings, steps, tuner, console)
        run_rows(bench, [*bench.ode_rows(), *tuned[steps]])
        report(bench, steps, tuned[steps], None, options.results_dir, further, console)
    if options.latency:
        seconds = measure_latencies(bench, [row for rows in tuned.values() for row in rows])
        for steps, rows in tuned.items():
            report(bench, steps, rows, seconds, options.results_dir, furthers[steps], console)


def report(
    bench: Workbench,
    steps: int,
    rows: Sequence[Row],
    seconds: Mapping[str, list[float]] | None,
    directory: Path,
    further: Mapping[str, Any],
    console: Console,
) -> None:
    """Write what was found for one number of steps, and say it."""
    document = {**gather(bench, rows, seconds), **further}
    name = f"pareto_{bench.settings.model_type}_{steps}"
    for table in write_report(directory, name, steps, document):
        console.print(table.rich())
    console.print(f"Report: {directory / name}.md", soft_wrap=True)
