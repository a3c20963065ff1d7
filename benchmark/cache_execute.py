"""Compare cache methods on a diffusion transformer; `--help` lists the arguments."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.settings import Settings, read_settings  # noqa: E402


def execute(settings: Settings, console: Console) -> None:
    """Run what the settings say; raises `BenchmarkError` before anything is written."""
    from benchmark.parallel import LEADER, follow, joined, parallelised, rank

    with joined(settings) as engine_config:
        if rank() == LEADER:
            lead(settings, console, engine_config)
        else:
            from benchmark.loading import load_pipeline
            from benchmark.runner import use_threads

            use_threads(settings)
            follow(parallelised(load_pipeline(settings), engine_config), settings)


def lead(settings: Settings, console: Console, engine_config: Any) -> None:
    """Plan, make, score and report; the only rank that logs and writes."""
    # Imported late: --help and mistakes on the command line answer at once.
    from benchmark.families import FAMILIES
    from benchmark.generate import prepared
    from benchmark.loading import fingerprint, load_documented, load_prompts
    from benchmark.plan import comparison_rows, gamma_lambda_rows, same_compute_rows
    from benchmark.report import gather, write_results
    from benchmark.runner import Workbench, measure_latencies, run_rows, threads
    from benchmark.store import Store
    from benchmark.sweep import sweep_rows
    from benchmark.sweeps import SWEEPS
    from benchmark.tuning import CALIBRATION_PROMPTS, Tuner

    store = Store(settings.output_dir)
    store.check(settings.resume)
    documented = load_documented(settings)
    load_prompts(settings)
    make_rows = {
        "comparison": comparison_rows,
        "sweep": partial(sweep_rows, sweeps=SWEEPS[settings.model_type]),
        "gamma_lambda": gamma_lambda_rows,
    }[settings.mode]
    solvers = FAMILIES[settings.model_type].solvers
    try:
        rows = make_rows(
            settings.cache_methods,
            settings.num_inference_steps,
            documented,
            settings.cache_options,
            solvers,
        )
    except (TypeError, ValueError) as error:
        raise BenchmarkError(str(error)) from error

    console.print(f"Loading {settings.model}")
    bench = Workbench(settings, engine_config)
    for row in rows:
        with prepared(bench.pipe, row):
            pass  # what cannot be enabled is said before anything is written
    store.open(run_identity(settings, fingerprint, threads(settings)), settings.resume)
    tuner = Tuner(bench, CALIBRATION_PROMPTS)
    rows = [tuner.tuned(row) for row in rows]
    run_rows(bench, [*bench.ode_rows(), *rows])
    seconds = None
    if settings.mode == "comparison":
        fractions = {row.key: store.row(row.key)["compute_fraction"] for row in rows}
        rows = sorted(
            rows + same_compute_rows(rows, fractions, solvers),
            key=lambda row: settings.num_inference_steps.index(row.reference_steps),
        )
        run_rows(bench, rows)
        seconds = measure_latencies(bench, rows)
    for table in write_results(store, gather(bench, rows, seconds)):
        console.print(table.rich())
    console.print(f"Report: {store.report}", soft_wrap=True)


def run_identity(settings: Settings, fingerprint, threads: int) -> dict:
    """What has to be the same for finished rows to be used again."""
    identity = settings.to_dict()
    for name in ("resume", "workers"):
        del identity[name]
    model = Path(settings.model).expanduser()
    identity["threads"] = threads
    identity["model files"] = fingerprint(model) if model.is_dir() else None
    identity["library files"] = fingerprint(ROOT / "xfuser_adacorr")
    return identity


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    errors, rank, settings = Console(stderr=True), os.environ.get("RANK", "0"), None
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv)
        console = Console()
        console.width = max(console.width, 130)  # tables are not to be cut off
        execute(settings, console)
    except BenchmarkError as error:
        if rank != "0" and settings is None:
            return 2  # rank 0 says it
        error = error if rank == "0" else f"rank {rank}: {error}"
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted; the same command with --resume goes on", markup=False)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("LOG_LEVEL", "error")  # of xfuser
    sys.exit(main())
