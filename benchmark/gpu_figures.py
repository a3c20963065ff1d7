"""Speed and memory of every cache on models of published sizes; random weights, one GPU.

`docs/gpu.md` says what is measured and how to read it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from benchmark.command import exit_code  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402

MODELS = ("flux", "opensora")
MODES = ("eager", "compile", "cudagraphs")
"""How blocks run: as written; each compiled into one graph; those graphs as CUDA graphs."""
RESULTS = ROOT / "benchmark" / "results" / "gpu"
LEAST_REUSED = 4
"""Calls after the first computed ones: the last two may be forced."""


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments, checked; raises `BenchmarkError` that names a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="how blocks run; default: all that can"
    )
    parser.add_argument("--rows", nargs="+", help="names of the table's rows; default: all")
    parser.add_argument("--steps", type=int, default=20, help="of each generation")
    parser.add_argument(
        "--computed_steps", type=int, default=8, help="first steps that every cache computes"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed ones; two go before them")
    parser.add_argument("--dry_run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output_dir")
    parser.add_argument("--output_dir", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    for name, least in (("computed_steps", 2), ("rounds", 1)):
        if getattr(given, name) < least:
            raise BenchmarkError(f"--{name} must be at least {least}, got {getattr(given, name)}")
    if given.steps < given.computed_steps + LEAST_REUSED:
        raise BenchmarkError(
            f"--steps must be at least {LEAST_REUSED} above --computed_steps "
            f"{given.computed_steps}, got {given.steps}"
        )
    if given.dry_run and given.modes and "cudagraphs" in given.modes:
        raise BenchmarkError(
            "--modes: cudagraphs needs a GPU; accepted with --dry_run: " + ", ".join(MODES[:2])
        )
    if given.dry_run and given.output_dir is None:
        raise BenchmarkError("--output_dir must be given with --dry_run: its figures mean nothing")
    given.modes = given.modes or list(MODES[:2] if given.dry_run else MODES)
    given.output_dir = given.output_dir or RESULTS
    return given


def chosen_rows(model: str, names: Sequence[str] | None) -> list[Any]:
    """The rows of a model that were asked for; the uncached one always."""
    from benchmark.gpu_rows import UNCACHED, rows_of

    return [row for row in rows_of(model) if names is None or row.name in (UNCACHED, *names)]


def check_rows(names: Sequence[str] | None, models: Sequence[str]) -> None:
    """Raise `BenchmarkError` for a row that none of the models has."""
    from benchmark.gpu_rows import rows_of

    known = list(dict.fromkeys(row.name for model in models for row in rows_of(model)))
    for name in names or []:
        if name not in known:
            raise BenchmarkError(f"--rows: {name!r} is no row; accepted: {', '.join(known)}")


def device_for(dry_run: bool) -> Any:
    import torch

    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BenchmarkError(
            "no GPU: PyTorch sees no CUDA device; on a CPU only --dry_run works, with tiny models"
        )
    return torch.device("cuda", torch.cuda.current_device())


def execute(given: argparse.Namespace) -> None:
    """Measure what is asked for and not yet there, and write the tables after each mode."""
    from benchmark.gpu_models import SIZED, TINY
    from benchmark.gpu_report import machine
    from benchmark.store import Store

    device = device_for(given.dry_run)
    check_rows(given.rows, given.model)
    settings = {
        "dry_run": given.dry_run,
        "steps": given.steps,
        "computed_steps": given.computed_steps,
        "dtype": "float32" if given.dry_run else "bfloat16",
    }
    store, described = Store(given.output_dir), machine(device)
    store.check(given.resume)
    store.open({**settings, "machine": described}, given.resume)
    for name in given.model:
        model = (TINY if given.dry_run else SIZED)[name]
        measure_model(given, model, device, store, partial(write, store, settings, described))


def measure_model(
    given: argparse.Namespace, model: Any, device: Any, store: Any, on_mode: Callable[[], None]
) -> None:
    """All modes of one model, which is let go of afterwards."""
    import torch
    from tqdm.auto import tqdm

    from benchmark.gpu_measure import Bench, measure
    from benchmark.gpu_rows import Schedule

    rows, schedule = (
        chosen_rows(model.name, given.rows),
        Schedule(given.steps, given.computed_steps),
    )
    pipe = model.make(device, torch.float32 if given.dry_run else torch.bfloat16)
    for mode in given.modes:
        bench = Bench.of(model, mode, pipe, schedule, store)
        with tqdm(desc=bench.key, total=len(rows) * (given.rounds + 2), unit="visit") as bar:

            def on_visit(row: str, bar: tqdm = bar) -> None:
                bar.set_postfix_str(row)
                bar.update()

            measure(bench, rows, given.rounds, on_visit)
        torch._dynamo.reset()
        on_mode()


def write(store: Any, settings: dict[str, Any], described: dict[str, Any]) -> None:
    """The JSON file and the tables of everything in the directory, of earlier runs too."""
    from benchmark.gpu_report import report, summarise
    from benchmark.gpu_rows import UNCACHED
    from benchmark.store import write_json, write_text

    results = []
    for model in MODELS:
        for mode in MODES:
            entries = store.row(f"{model}-{mode}")
            if entries and entries[UNCACHED]["rounds"]:
                results.append({"model": model, "mode": mode, "rows": summarise(entries)})
    document = {"schema": 1, "machine": described, "settings": settings, "results": results}
    write_json(store.results, document)
    write_text(store.report, report(document))


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: execute(read_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
