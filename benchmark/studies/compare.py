"""Cache methods against the uncached pipeline and against fewer steps; also their sweeps."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_documented, load_pipeline, load_prompts
from benchmark.report.comparison import gather, write_results
from benchmark.run.generate import follow, prepared
from benchmark.run.parallel import LEADER, joined, parallelised, rank
from benchmark.run.rows import (
    Row,
    check_options_act,
    comparison_rows,
    gamma_lambda_rows,
    same_compute_rows,
)
from benchmark.run.store import Store
from benchmark.run.sweep import SWEEPS, learned_rows, sweep_rows
from benchmark.run.tuning import CALIBRATION_PROMPTS, Tuner
from benchmark.run.workbench import Workbench, measure_latencies, run_rows, use_threads
from benchmark.settings import Settings
from benchmark.studies.session import run_identity


def run(settings: Settings, console: Console) -> None:
    """Run what the settings say; raises `BenchmarkError` before anything is written."""
    with joined(settings) as engine_config:
        if rank() == LEADER:
            lead(settings, console, engine_config)
        else:
            use_threads(settings)
            follow(parallelised(load_pipeline(settings), engine_config), settings)


def rows_of(settings: Settings) -> list[Row]:
    """The rows that are asked for; `BenchmarkError` for options that a method does not take."""
    make_rows = {
        "comparison": comparison_rows,
        "sweep": partial(sweep_rows, sweeps=SWEEPS[settings.model_type]),
        "gamma_lambda": gamma_lambda_rows,
    }[settings.mode]
    try:
        solvers = FAMILIES[settings.model_type].solvers
        rows = make_rows(
            settings.cache_methods,
            settings.num_inference_steps,
            load_documented(settings),
            settings.cache_options,
            solvers,
        )
        if settings.mode == "sweep":
            model, scale = Path(settings.model), settings.guidance_scale
            for steps in settings.num_inference_steps:
                rows += learned_rows(settings.cache_methods, model, steps, scale, solvers[0])
        check_options_act(list(dict.fromkeys(row.name for row in rows)), settings.cache_options)
        return rows
    except (TypeError, ValueError) as error:
        raise BenchmarkError(str(error)) from error


def lead(settings: Settings, console: Console, engine_config: Any) -> None:
    """Plan, make, score and report; the only rank that logs and writes."""
    store = Store(settings.output_dir)
    store.check(settings.resume)
    rows = rows_of(settings)
    load_prompts(settings)
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings, engine_config)
    for row in rows:
        with prepared(bench.pipe, row):
            pass  # what cannot be enabled is said before anything is written
    store.open(run_identity(settings), settings.resume)
    tuner = Tuner(bench, CALIBRATION_PROMPTS)
    rows = [tuner.tuned(row) for row in rows]
    run_rows(bench, [*bench.ode_rows(), *rows])
    seconds = None
    if settings.mode == "comparison":
        fractions = {row.key: store.row(row.key)["compute_fraction"] for row in rows}
        solvers = FAMILIES[settings.model_type].solvers
        rows = sorted(
            rows + same_compute_rows(rows, fractions, solvers),
            key=lambda row: settings.num_inference_steps.index(row.reference_steps),
        )
        run_rows(bench, rows)
        seconds = measure_latencies(bench, rows)
    for table in write_results(store, gather(bench, rows, seconds)):
        console.print(table.rich())
    console.print(f"Report: {store.report}", soft_wrap=True)
