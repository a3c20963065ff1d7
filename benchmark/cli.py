"""``python -m benchmark STUDY ...``: finds the study, reads its options, and runs it."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from rich.console import Console

from benchmark.errors import BenchmarkError
from benchmark.options import Parser, add_options, taken
from benchmark.settings import Settings
from benchmark.studies.catalogue import RESULTS, STUDIES, Study

USAGE = "python -m benchmark STUDY [options]; python -m benchmark STUDY --help lists them"


def make_parser(study: Study) -> Parser:
    """The parser of a study's options; what is not given leaves no trace in the namespace."""
    parser = Parser(
        prog=f"python -m benchmark {study.name}",
        description=study.question,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if study.options:
        add_options(parser, study.options)
    if study.takes:
        shown = {**study.defaults, "output_dir": study.output and RESULTS / study.output}
        add_options(parser, Settings, study.takes, {k: v for k, v in shown.items() if v})
    return parser


def read(study: Study, arguments: Sequence[str]) -> list[Any]:
    """The settings and the study's own options, those of both that it has.

    Raises:
        BenchmarkError: an argument is unknown or wrong.
    """
    given = vars(make_parser(study).parse_args(arguments))
    read_in = [study_settings(study, taken(given, Settings))] if study.takes else []
    return read_in + ([study.options(**taken(given, study.options))] if study.options else [])


def study_settings(study: Study, given: Mapping[str, Any]) -> Settings:
    """What is given, and the study's defaults for what is not."""
    named = {**study.defaults, **given}
    if not study.output or "output_dir" in given:
        return Settings(**named)
    settings = Settings(**{**named, "output_dir": RESULTS, "resume": False})
    steps = settings.num_inference_steps[0]
    folder = study.output.replace("FAMILY", settings.model_type).replace("STEPS", str(steps))
    return replace(settings, output_dir=RESULTS / folder, resume=given.get("resume", False))


def run_study(name: str, arguments: Sequence[str]) -> int:
    """Run a study; returns the exit code (`exit_code`)."""
    study = STUDIES[name]
    console = Console()
    console.width = max(console.width, study.width)  # tables are not to be cut off

    def run(given: list[Any]) -> None:
        import_module(study.module).run(*given, console)

    return exit_code(lambda: read(study, arguments), run)


def exit_code(prepare: Callable[[], Any], run: Callable[[Any], None]) -> int:
    """0, 2 for a mistake of the user's, told in one line, 130 if interrupted.

    Of several ranks the first one alone tells what is wrong with the arguments, which all share.
    """
    errors, rank, prepared = Console(stderr=True), os.environ.get("RANK", "0"), None
    try:
        prepared = prepare()
        run(prepared)
    except BenchmarkError as error:
        if rank == "0" or prepared is not None:
            told = error if rank == "0" else f"rank {rank}: {error}"
            errors.print(f"error: {told}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted; the same command with --resume goes on", markup=False)
        return 130
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the study that the first argument names, or list all; returns the exit code."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        Console().print(_overview(), markup=False, highlight=False, soft_wrap=True)
        return 0
    if name not in STUDIES:
        accepted = ", ".join(STUDIES)
        message = f"error: no study {name!r}; accepted: {accepted}"
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        return 2
    return run_study(name, rest)


def _overview() -> str:
    width = max(map(len, STUDIES))
    lines = [f"  {study.name:{width}}  {study.question}" for study in STUDIES.values()]
    return "\n".join([USAGE, "", *lines])


def start(arguments: Sequence[str]) -> None:
    """`main` for a process of its own, in which libraries keep their warnings to themselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("LOG_LEVEL", "error")  # of xfuser
    sys.exit(main(arguments))
