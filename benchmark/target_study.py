"""Whether `Auto` holds the targets it is given, and reaches the PSNR that it expects.

`Auto` runs with targets of compute and of PSNR, and with tolerances, on prompts that its
calibration has not seen. `--help` lists the arguments.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.command import passed_on, run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.settings import Settings, read_settings  # noqa: E402

OUTPUT = ROOT / "benchmark" / "results" / "targets"
POINTS = {
    "target_compute": ((0.25, 0.35, 0.5), "compute fractions to hold"),
    "target_psnr": ((30.0, 40.0, 50.0), "PSNR in dB to expect"),
    "adacorr_tolerance": ((0.004, 0.02), "tolerances in place of a target"),
}
"""Option -> values by default, and what they are."""
PASSED_ON = (
    "model_type",
    "model",
    "prompts",
    "judge",
    "num_inference_steps",
    "guidance_scale",
    "device",
    "threads",
    "split",
    "num_prompts",
)


def make_parser() -> Parser:
    parser = Parser(
        prog="target_study.py",
        description="Auto with targets and tolerances: compute, true and expected PSNR.",
        epilog="The other arguments are those of cache_execute.py; 8 prompts are taken by default.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    for name, (values, meaning) in POINTS.items():
        listed = " ".join(f"{value:g}" for value in values)
        add(
            f"--{name}",
            type=float,
            nargs="*",
            default=values,
            metavar="X",
            help=f"{meaning} ({listed})",
        )
    add(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="new or empty (benchmark/results/targets/FAMILY)",
    )
    add("--resume", action="store_true", help="go on with an interrupted study")
    for name in PASSED_ON:
        add(f"--{name}", metavar="X", default="8" if name == "num_prompts" else None)
    return parser


def study_rows(given: Namespace, steps: int, solver: str) -> list[Any]:
    """A row for every value of every option; `BenchmarkError` for one that is not accepted."""
    from benchmark.plan import cached_row
    from xfuser_adacorr import CacheConfig

    rows = []
    for name in POINTS:
        for value in getattr(given, name):
            try:
                config = CacheConfig(use_cache="Auto", **{name: value})
            except ValueError as error:
                raise BenchmarkError(f"--{name}: {error}") from error
            rows.append(cached_row("Auto", steps, config, solver))
    return rows


def calibration_of(transformer: Any) -> dict[str, Any]:
    """The relation and the settings in the targets' file beside the model."""
    from xfuser_adacorr.model_executor.cache.calibration import calibration_path
    from xfuser_adacorr.model_executor.cache.target_calibration import TARGETS_FILE

    path = calibration_path(transformer, TARGETS_FILE, None)
    if path is None:
        raise BenchmarkError(
            f"--model: there is no {TARGETS_FILE} beside its weights; "
            "scripts/calibrate_targets.py makes it"
        )
    content = json.loads(path.read_text())
    return {"psnr": content["psnr"], "settings": content["settings"]}


def measure(
    store: Any,
    uncached: Any,
    rows: Sequence[Any],
    make: Callable[[Any], Any],
    psnr: Callable[[Any, Any], list[float]],
) -> list[dict[str, Any]]:
    """`target_report.Result` of every row, each kept as soon as it is finished.

    ``make(row)`` makes pictures, `generate.Generated`.
    """
    from benchmark.metrics import PSNR_CAP_DB

    reference = store.pictures(uncached.key)
    if reference is None:
        reference = make(uncached).pictures
        store.save_pictures(uncached.key, reference)
    results = []
    for row in rows:
        kept = store.row(row.key)
        if kept is None:
            made = make(row)
            config = row.config.to_dict()
            option = next(name for name in POINTS if config[name] is not None)
            expected = [summary.expected_psnr_db for summary in made.summaries]
            known = None not in expected
            kept = {
                "option": option,
                "value": config[option],
                "compute_fraction": [round(s.compute_fraction, 6) for s in made.summaries],
                "psnr_db": [round(value, 4) for value in psnr(made.pictures, reference)],
                "expected_psnr_db": [round(min(x, PSNR_CAP_DB), 4) for x in expected]
                if known
                else None,
                "config": config,
            }
            store.save_row(row.key, kept)
        results.append(kept)
    return results


def study_settings(given: Namespace) -> Settings:
    """The settings of the runs; raises `BenchmarkError` for what is wrong."""
    settings = read_settings(["--output_dir=.", *passed_on(given, PASSED_ON)])
    directory = given.output_dir or OUTPUT / settings.model_type
    return replace(settings, output_dir=directory, resume=given.resume)


def run(argv: Sequence[str], console: Console) -> None:
    """Make all pictures, then write ``results.json``, ``report.md`` and ``calibration.png``."""
    given = make_parser().parse_args(argv)
    settings = study_settings(given)

    from tqdm.auto import tqdm

    from benchmark.cache_execute import run_identity
    from benchmark.families import FAMILIES
    from benchmark.generate import generate_row, prepared
    from benchmark.loading import fingerprint, load_prompts
    from benchmark.metrics import psnr_db
    from benchmark.plots import plot_calibration
    from benchmark.report import environment, write_study
    from benchmark.runner import Workbench, threads
    from benchmark.store import Store
    from benchmark.target_report import agreement_table, agreements, points_table, render
    from benchmark.video_metrics import clip_psnr_db

    store = Store(settings.output_dir)
    store.check(settings.resume)
    steps = settings.num_inference_steps[0]
    rows = study_rows(given, steps, FAMILIES[settings.model_type].solvers[0])
    load_prompts(settings)
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    calibration = calibration_of(bench.pipe.transformer)
    for row in rows:
        with prepared(bench.pipe, row):
            pass  # what cannot be enabled is said before anything is written
    points = {name: list(getattr(given, name)) for name in POINTS}
    store.open({**run_identity(settings, fingerprint, threads(settings)), **points}, given.resume)

    total = (1 + len(rows)) * len(bench.entries)
    with tqdm(total=total, desc="pictures", unit="picture", smoothing=0.05) as bar:

        def make(row: Any) -> Any:
            return generate_row(bench.pipe, settings, row, bench.entries, bar.update)

        psnr = psnr_db if settings.num_frames is None else clip_psnr_db
        results = measure(store, bench.uncached_row(steps), rows, make, psnr)
    spread = calibration["settings"]["spread_db"]
    document = {
        "schema": 1,
        "environment": environment(bench),
        "settings": settings.to_dict(),
        "calibration": calibration,
        "prompts": bench.entries,
        "agreement": agreements(results, spread),
        "results": results,
    }
    figure = store.save_figure(
        "calibration.png", lambda path: plot_calibration(path, results, spread)
    )
    tables = [points_table(results), agreement_table(document["agreement"])]
    write_study(store, document, render(document, figure), tables, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
