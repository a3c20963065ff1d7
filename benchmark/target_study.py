"""Whether `Auto` holds the targets it is given, and reaches the PSNR that it expects.

`Auto` runs with targets of compute and of PSNR, and with tolerances, on prompts that its
calibration has not seen. `--help` lists the arguments.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.command import run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.study import kept_pictures, opened, study_parser, study_settings  # noqa: E402

OUTPUT = ROOT / "benchmark" / "results" / "targets"
POINTS = {
    "target_compute": ((0.25, 0.35, 0.5), "compute fractions to hold"),
    "target_psnr": ((30.0, 40.0, 50.0), "PSNR in dB to expect"),
    "adacorr_tolerance": ((0.004, 0.02), "tolerances in place of a target"),
}
"""Option -> values by default, and what they are."""
PASSED_ON = {
    "model_type": "flux",
    "model": None,
    "prompts": None,
    "judge": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "device": None,
    "threads": None,
    "split": None,
    "num_prompts": "8",
}
"""Name -> default."""


def make_parser() -> Parser:
    parser = study_parser(
        "target_study.py",
        "Auto with targets and tolerances: compute, true and expected PSNR.",
        PASSED_ON,
        "benchmark/results/targets/FAMILY_STEPS",
        "8 prompts of the test split are taken by default.",
    )
    for name, (values, meaning) in POINTS.items():
        listed = " ".join(f"{value:g}" for value in values)
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="*",
            default=values,
            metavar="X",
            help=f"{meaning} ({listed})",
        )
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


def calibration_of(model: str) -> dict[str, Any]:
    """The relation and the settings in the targets' file beside the model's weights."""
    from xfuser_adacorr.model_executor.cache.target_calibration import TARGETS_FILE

    path = Path(model) / "transformer" / TARGETS_FILE
    if not path.is_file():
        raise BenchmarkError(f"--model: there is no {path}; scripts/calibrate_targets.py makes one")
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

    reference = kept_pictures(store, uncached, make)
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


def run(argv: Sequence[str], console: Console) -> None:
    """Make all pictures, then write ``results.json``, ``report.md`` and ``calibration.png``."""
    given = make_parser().parse_args(argv)
    settings = study_settings(given, PASSED_ON, OUTPUT)

    from benchmark.families import FAMILIES
    from benchmark.plots import plot_calibration
    from benchmark.target_report import agreement_table, agreements, points_table, render

    steps = settings.num_inference_steps[0]
    rows = study_rows(given, steps, FAMILIES[settings.model_type].solvers[0])
    calibration = calibration_of(settings.model)
    spread = calibration["settings"]["spread_db"]
    points = {name: list(getattr(given, name)) for name in POINTS}
    with opened(settings, console, points) as session:
        bench = session.bench
        uncached = bench.uncached_row(steps)
        results = measure(bench.store, uncached, rows, session.make, session.psnr)
        figure = bench.store.save_figure(
            "calibration.png", lambda path: plot_calibration(path, results, spread)
        )
    found = {
        "calibration": calibration,
        "prompts": bench.entries,
        "agreement": agreements(results, spread),
        "results": results,
    }
    session.write(
        found,
        lambda document: render(document, figure),
        lambda document: [points_table(results), agreement_table(document["agreement"])],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
