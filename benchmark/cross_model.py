"""The table of all cache methods on all shipped model families; `--help` lists the arguments.

Every family is a comparison by ``cache_execute.py`` at its usual number of steps, with the options
of a configuration file, in a directory of its own. The table is written from their results.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.cache_execute import execute  # noqa: E402
from benchmark.command import passed_on, run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.families import FAMILIES  # noqa: E402
from benchmark.settings import Settings, read_settings  # noqa: E402

PIPELINES = ROOT / "benchmark" / "pipelines"
CONFIGS = ROOT / "configs" / "small"
OUTPUT = ROOT / "benchmark" / "results" / "cross_model"
METHODS = ["None", "Fb", "Tea", "Fast", "Ada", "Auto"]
PASSED_ON = (
    "cache_methods",
    "num_prompts",
    "repetitions",
    "warmup",
    "device",
    "threads",
    "workers",
)


def make_parser() -> Parser:
    parser = Parser(
        prog="cross_model.py",
        description="All cache methods on all model families, in one table.",
        epilog="The other arguments are those of cache_execute.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--families", nargs="+", choices=list(FAMILIES), help="model families (all shipped)")
    add(
        "--pipelines",
        type=Path,
        default=PIPELINES,
        metavar="DIR",
        help="folder with a diffusers directory named FAMILY for each (benchmark/pipelines)",
    )
    add(
        "--configs",
        type=Path,
        default=CONFIGS,
        metavar="DIR",
        help="folder with FAMILY.yaml for each, each method's options (configs/small)",
    )
    add(
        "--output_dir",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="a run for each family below it, and the table (benchmark/results/cross_model)",
    )
    add("--resume", action="store_true", help="go on with interrupted runs, keep finished ones")
    add(
        "--update_readme",
        action="store_true",
        help="only put the table of --output_dir into README.md, between its markers",
    )
    add(
        "--cache_methods",
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help="base methods; their corrected variants are added (all)",
    )
    for name in PASSED_ON[1:]:
        add(f"--{name}", metavar="X")
    return parser


def family_settings(given: Namespace) -> list[Settings]:
    """One run for each family, checked as far as can be before anything is run.

    Raises:
        BenchmarkError: an argument is wrong, a pipeline is missing, a directory is taken.
    """
    from benchmark.loading import load_documented, load_prompts
    from benchmark.store import Store

    shipped = [name for name in FAMILIES if (given.pipelines / name).is_dir()]
    chosen = list(dict.fromkeys(given.families or shipped))
    missing = [name for name in chosen if name not in shipped]
    if missing or not chosen:
        raise BenchmarkError(
            f"--families: no pipeline of {', '.join(missing) or 'any family'} in "
            f"{given.pipelines}; accepted: {', '.join(shipped) or 'none'}"
        )
    runs = []
    for name in chosen:
        output = given.output_dir / name
        resumed = given.resume and (output / "rows" / "settings.json").is_file()
        arguments = [f"--model_type={name}", f"--model={given.pipelines / name}"]
        arguments += [f"--config={given.configs / f'{name}.yaml'}"]
        arguments += [f"--output_dir={output}", "--enable_adacorrection"]
        arguments += ["--resume"] if resumed else []
        settings = read_settings([*arguments, *passed_on(given, PASSED_ON)])
        Store(output).check(resumed)
        load_documented(settings)
        load_prompts(settings)
        runs.append(settings)
    return runs


def run(argv: Sequence[str], console: Console) -> None:
    """Run the families one after the other, then write the table."""
    given = make_parser().parse_args(argv)
    if given.update_readme:
        from benchmark.cross_report import update_readme

        update_readme(ROOT / "README.md", given.output_dir / "cross_model.json")
        return
    runs = family_settings(given)
    for settings in runs:
        execute(settings, console)

    from benchmark.cross_report import gather, write_report

    documents = {
        settings.model_type: json.loads((settings.output_dir / "results.json").read_text("utf-8"))
        for settings in runs
    }
    console.print(write_report(given.output_dir, gather(documents)).rich())
    console.print(f"Table: {given.output_dir / 'cross_model.md'}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv, least_width=150)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("LOG_LEVEL", "error")  # of xfuser
    sys.exit(main())
