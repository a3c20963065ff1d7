"""Speed and memory of every cache on models of published sizes; random weights, one GPU.

`docs/gpu.md` says what is measured and how to read it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from benchmark.errors import BenchmarkError
from benchmark.gpu.measure import Bench, measure
from benchmark.gpu.models import SIZED, TINY, SizedModel
from benchmark.gpu.report import machine, report, summarise
from benchmark.gpu.rows import UNCACHED, CacheRow, StepPlan, rows_of
from benchmark.run.store import Store, write_json, write_text
from benchmark.studies.catalogue import GPU_MODELS, GPU_MODES, GpuOptions


def chosen_rows(model: str, names: Sequence[str] | None) -> list[CacheRow]:
    """The rows of a model that were asked for; the uncached one always."""
    return [row for row in rows_of(model) if names is None or row.name in (UNCACHED, *names)]


def check_rows(names: Sequence[str] | None, models: Sequence[str]) -> None:
    """Raise `BenchmarkError` for a row that none of the models has."""
    known = list(dict.fromkeys(row.name for model in models for row in rows_of(model)))
    for name in names or []:
        if name not in known:
            raise BenchmarkError(f"--rows: {name!r} is no row; accepted: {', '.join(known)}")


def device_for(dry_run: bool) -> torch.device:
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BenchmarkError(
            "no GPU: PyTorch sees no CUDA device; on a CPU only --dry_run works, with tiny models"
        )
    return torch.device("cuda", torch.cuda.current_device())


def run(given: GpuOptions, console: Console) -> None:
    """Measure what is asked for and not yet there, and write the tables after each mode."""
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
    given: GpuOptions,
    model: SizedModel,
    device: torch.device,
    store: Store,
    on_mode: Callable[[], None],
) -> None:
    """All modes of one model, which is let go of afterwards."""
    rows = chosen_rows(model.name, given.rows)
    steps = StepPlan(given.steps, given.computed_steps)
    pipe = model.make(device, torch.float32 if given.dry_run else torch.bfloat16)
    for mode in given.modes:
        bench = Bench.of(model, mode, pipe, steps, store)
        with tqdm(desc=bench.key, total=len(rows) * (given.rounds + 2), unit="visit") as bar:

            def on_visit(row: str, bar: tqdm = bar) -> None:
                bar.set_postfix_str(row)
                bar.update()

            measure(bench, rows, given.rounds, on_visit)
        torch._dynamo.reset()
        on_mode()


def write(store: Store, settings: dict[str, Any], described: dict[str, Any]) -> None:
    """The JSON file and the tables of everything in the directory, of earlier runs too."""
    results = []
    for model in GPU_MODELS:
        for mode in GPU_MODES:
            entries = store.row(f"{model}-{mode}")
            if entries and entries[UNCACHED]["rounds"]:
                results.append({"model": model, "mode": mode, "rows": summarise(entries)})
    document = {"schema": 1, "machine": described, "settings": settings, "results": results}
    write_json(store.results, document)
    write_text(store.report, report(document))
