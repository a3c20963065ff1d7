"""Quality over compute of our methods, other projects' and fewer steps; `--help` lists the
arguments.

One run sweeps every method over its knob, scores each row picture by picture against the uncached
run and the converged ODE, and writes a report for every number of steps.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.command import passed_on, run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.families import FAMILIES  # noqa: E402
from benchmark.method_names import CORRECTED, METHOD_NAMES, SCHEDULE, SCHEDULES, UNCACHED  # noqa: E402
from benchmark.peers import available  # noqa: E402
from benchmark.settings import Settings, read_settings  # noqa: E402
from benchmark.study import identity_of  # noqa: E402

if TYPE_CHECKING:
    from benchmark.plan import Row
    from benchmark.runner import Workbench
    from benchmark.tuning import Tuner

RESULTS = ROOT / "benchmark" / "results"
PASSED_ON = (
    "model_type",
    "model",
    "prompts",
    "judge",
    "config",
    "num_inference_steps",
    "num_prompts",
    "true_cfg_scale",
    "guidance_scale",
    "repetitions",
    "warmup",
    "device",
    "threads",
    "workers",
)
TUNING = ("tuning_prompts", "search_evaluations")
STAND_INS = {
    SCHEDULE: {SCHEDULE: "reuse", f"{SCHEDULE}, forecast": "forecast"},
    SCHEDULE + CORRECTED: {SCHEDULE + CORRECTED: "adacorrection"},
}
"""Method -> the rows' names and what stands in for their skipped calls."""


def make_parser() -> Parser:
    parser = Parser(
        prog="pareto.py",
        description="Quality over compute of our methods, other projects' and fewer steps.",
        epilog="The other arguments are those of cache_execute.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="as cache_execute.py's --cache_methods (ours, and all other projects' that are "
        "installed and have the family)",
    )
    add("--latency", action="store_true", help="also measure latency, all rows in turn")
    add("--tuning_prompts", type=int, default=8, metavar="N", help="of the development split (8)")
    add(
        "--search_evaluations",
        type=int,
        default=40,
        metavar="N",
        help="schedules that the search for each budget scores at the most (40)",
    )
    add(
        "--output_dir",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="for pareto_FAMILY_STEPS.json, .md and .png (benchmark/results)",
    )
    add(
        "--work_dir",
        metavar="DIR",
        help="for finished rows, new or empty (adacorr-results/pareto-FAMILY)",
    )
    add("--resume", action="store_true", help="go on with the run in --work_dir")
    add(
        "--update_readme",
        action="store_true",
        help="run nothing: README's tables and figure from all results in --output_dir",
    )
    for name in PASSED_ON:
        add(f"--{name}", nargs="+" if name == "num_inference_steps" else None, metavar="X")
    return parser


def pareto_settings(given: Namespace) -> tuple[Settings, list[str]]:
    """The run, and what is said of methods that are left out; `BenchmarkError` for a mistake."""
    for name in TUNING:
        if getattr(given, name) < 1:
            raise BenchmarkError(f"--{name} must be at least 1, got {getattr(given, name)}")
    family = given.model_type or "flux"
    work_dir = given.work_dir or Path.cwd() / "adacorr-results" / f"pareto-{family}"
    arguments = passed_on(given, PASSED_ON)
    settings = read_settings([*arguments, f"--output_dir={work_dir}"])
    left_out: list[str] = []
    methods = given.methods
    if methods is None:
        peers, left_out = available(family, true_cfg=settings.true_cfg_scale > 1)
        methods = [*METHOD_NAMES, *SCHEDULES, *peers]
    chosen = read_settings([*arguments, "--cache_methods", *methods, f"--output_dir={work_dir}"])
    wanted = tuple(name for name in chosen.cache_methods if name != UNCACHED)
    return (
        replace(
            chosen, mode="pareto", cache_methods=wanted, ode_reference=True, resume=given.resume
        ),
        left_out,
    )


def swept_rows(settings: Settings, steps: int) -> "list[Row]":
    """All rows but those that have to be searched, tuned to nothing yet."""
    from benchmark.loading import load_documented
    from benchmark.sweep import sweep_rows
    from benchmark.sweeps import SWEEPS

    methods = [name for name in settings.cache_methods if name not in SCHEDULES]
    return sweep_rows(
        methods,
        [steps],
        load_documented(settings),
        {},
        FAMILIES[settings.model_type].solvers,
        SWEEPS[settings.model_type],
    )


def searched_rows(settings: Settings, steps: int, tuner: "Tuner", console: Console) -> "list[Row]":
    """A searched schedule for every stand-in and budget."""
    from benchmark.sweep import schedule_budgets

    rows = []
    for method in (name for name in settings.cache_methods if name in SCHEDULES):
        for name, stand_in in STAND_INS[method].items():
            for computed in schedule_budgets(steps):
                console.print(f"{name}: searching {computed} of {steps} steps")
                rows.append(tuner.searched_row(name, stand_in, steps, computed))
    return rows


def identity(settings: Settings, given: Namespace) -> dict:
    """What has to be the same for finished rows to be used again; other methods may be added."""
    content = identity_of(settings)
    for name in ("cache_methods", "num_inference_steps", "repetitions", "warmup"):
        del content[name]
    return {**content, **{name: getattr(given, name) for name in TUNING}}


def run(argv: Sequence[str], console: Console) -> None:
    """Sweep, tune, score and report; raises `BenchmarkError` before anything is written."""
    given = make_parser().parse_args(argv)
    if given.update_readme:
        from benchmark.pareto_summary import update_readme

        update_readme(ROOT / "README.md", given.output_dir)
        return
    settings, left_out = pareto_settings(given)

    # Imported late: --help and mistakes on the command line answer at once.
    from benchmark.generate import prepared
    from benchmark.runner import Workbench, measure_latencies, run_rows
    from benchmark.store import Store
    from benchmark.tuning import Tuner

    store = Store(settings.output_dir)
    store.check(settings.resume)
    swept = {steps: swept_rows(settings, steps) for steps in settings.num_inference_steps}
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    for rows in swept.values():
        for row in {row.name: row for row in rows}.values():
            with prepared(bench.pipe, row):
                pass  # what cannot be enabled is said before anything is written
    store.open(identity(settings, given), settings.resume)
    tuner = Tuner(bench, given.tuning_prompts, given.search_evaluations)
    tuning = {name: getattr(given, name) for name in TUNING}
    further = {"tuning": tuning, "left_out": left_out}
    tuned = {}
    for steps, rows in swept.items():
        tuned[steps] = [tuner.tuned(row) for row in rows]
        tuned[steps] += searched_rows(settings, steps, tuner, console)
        run_rows(bench, [*bench.ode_rows(), *tuned[steps]])
        report(bench, steps, tuned[steps], None, given.output_dir, further, console)
    if given.latency:
        seconds = measure_latencies(bench, [row for rows in tuned.values() for row in rows])
        for steps, rows in tuned.items():
            report(bench, steps, rows, seconds, given.output_dir, further, console)


def report(
    bench: "Workbench",
    steps: int,
    rows: "Sequence[Row]",
    seconds: Mapping[str, list[float]] | None,
    directory: Path,
    further: Mapping[str, Any],
    console: Console,
) -> None:
    """Write what was found for one number of steps, and say it."""
    from benchmark.pareto_report import write_report
    from benchmark.report import gather

    document = {**gather(bench, rows, seconds), **further}
    name = f"pareto_{bench.settings.model_type}_{steps}"
    for table in write_report(directory, name, steps, document):
        console.print(table.rich())
    console.print(f"Report: {directory / name}.md", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv, least_width=190)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("LOG_LEVEL", "error")  # of xfuser
    sys.exit(main())
