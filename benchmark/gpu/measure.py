"""Rounds that visit all rows in turn, and what each visit measures; every visit is kept at once."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmark.errors import BenchmarkError
from benchmark.gpu.models import SizedModel
from benchmark.gpu.probes import (
    CompiledBlocks,
    allocated,
    calls_marked_as_steps,
    computing_calls,
    drain,
    graph_counts,
    middle_block,
    peak_memory,
    synchronising_calls,
    timed_calls,
)
from benchmark.gpu.rows import UNCACHED, CacheRow, StepPlan
from benchmark.models.package import computed_calls
from benchmark.run.store import Store
from xfuser_adacorr import cache_summary

RECOMPILE_LIMIT = 128
"""Every row's hooks and classes are compiled for on their own: PyTorch gives up after 8."""


@dataclass(slots=True)
class Bench:
    """One model in one mode, and where its figures are kept."""

    model: SizedModel
    mode: str
    pipe: Any
    steps: StepPlan
    store: Store
    compiled: CompiledBlocks
    block: nn.Module
    """Whether it runs tells computed from reused calls, where a cache keeps no trace."""

    @classmethod
    def of(cls, model: SizedModel, mode: str, pipe: Any, steps: StepPlan, store: Store) -> "Bench":
        transformer = pipe.transformer
        compiled = CompiledBlocks(transformer, mode)
        return cls(model, mode, pipe, steps, store, compiled, middle_block(transformer))

    @property
    def key(self) -> str:
        return f"{self.model.name}-{self.mode}"

    @property
    def device(self) -> torch.device:
        return self.pipe.transformer.device

    def generate(self) -> None:
        self.model.generate(self.pipe, self.steps.number)

    @contextmanager
    def enabled(self, row: CacheRow) -> Iterator[None]:
        """The row's cache is on and has seen one generation; blocks run in the bench's mode."""
        is_marked = self.mode == "cudagraphs"
        marked = calls_marked_as_steps(self.pipe.transformer) if is_marked else nullcontext()
        with self.compiled.used(row.fullgraph), row.enabled(self.pipe, self.steps), marked:
            self.generate()  # what is counted, compiled or recorded once is done here
            yield

    def traced(self, row: CacheRow) -> list[bool] | None:
        """Of each call of the last generation, whether the trace says that it was computed."""
        if not row.has_trace:
            return None
        return computed_calls(cache_summary(self.pipe))


def measure(
    bench: Bench,
    rows: Sequence[CacheRow],
    rounds: int,
    on_visit: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure what the store does not have; a row that fails is told and left out from then on.

    First each row is visited to warm up, then to be probed, then once in each timed round.
    """
    kept = bench.store.row(bench.key) or {}
    for name in [name for name, entry in kept.items() if "error" in entry]:
        del kept[name]  # a resumed run tries it again
    visits = [(warm_up, "warm_up"), (probe, "probe"), *[(time_calls, None)] * rounds]
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT), quick_collections():
        for turn, (visit, name) in enumerate(visits):
            for row in rows:
                entry = kept.setdefault(row.name, {"rounds": []})
                timed_turn = turn - 2
                done = name in entry if name else len(entry["rounds"]) > timed_turn
                enough = len(entry["rounds"]) >= rounds
                if "error" in entry or enough or (done and name != "warm_up"):
                    continue
                _visit(bench, row, entry, visit, name)
                bench.store.save_row(bench.key, kept)
                on_visit(row.name)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Within, garbage is looked for among new objects alone: the libraries' own are many."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _visit(
    bench: Bench, row: CacheRow, entry: dict[str, Any], visit: Callable[..., Any], name: str | None
) -> None:
    try:
        result = visit(bench, row)
    except Exception as error:  # anything a cache, a compiler or a device may raise
        if row.name == UNCACHED:
            raise
        message = " ".join(str(error).split())[:300]
        entry["error"] = f"{type(error).__name__}: {message}"
    else:
        if name:
            entry[name] = result
        else:
            entry["rounds"].append(result)
    gc.collect()


def warm_up(bench: Bench, row: CacheRow) -> dict[str, int]:
    """Compile and record; how many graphs that took, and how many graph breaks."""
    before = graph_counts()
    with bench.enabled(row):
        pass
    graphs, breaks = (b - a for a, b in zip(before, graph_counts(), strict=True))
    return {"graphs": graphs, "graph_breaks": breaks}


def probe(bench: Bench, row: CacheRow) -> dict[str, Any]:
    """Memory, host synchronisations, and which calls are computed: one generation for each."""
    transformer, before = bench.pipe.transformer, allocated(bench.device)
    with bench.enabled(row):
        with peak_memory(bench.device) as peak:
            bench.generate()
        stated = cache_summary(bench.pipe).cache_memory_bytes if row.has_trace else None
        with synchronising_calls(bench.pipe) as synchronised:
            bench.generate()
        with computing_calls(transformer, bench.block) as computed:
            bench.generate()
        traced = bench.traced(row)
    if traced is not None and traced != computed:
        raise BenchmarkError(
            f"the trace says that calls {_numbers(traced)} were computed, the blocks ran in "
            f"{_numbers(computed)}"
        )
    return {
        "computed": computed,
        "host_synchronisations": synchronised,
        "peak_bytes": peak[0] - before if peak else None,
        "cache_memory_bytes": stated,
    }


def time_calls(bench: Bench, row: CacheRow) -> dict[str, Any]:
    """Seconds of every call of one generation, and of another one that nothing drains."""
    with bench.enabled(row):
        graphs, breaks = graph_counts()
        with timed_calls(bench.pipe) as seconds:
            bench.generate()
        computed = bench.traced(row)
        drain(bench.device)
        start = time.perf_counter()
        bench.generate()
        drain(bench.device)
        generation = time.perf_counter() - start
        graphs_after, breaks_after = graph_counts()
    return {
        "seconds": seconds,
        "computed": computed,
        "generation_s": generation,
        "graphs": graphs_after - graphs,
        "graph_breaks": breaks_after - breaks,
    }


def _numbers(computed: Sequence[bool]) -> str:
    return ", ".join(str(i) for i, is_computed in enumerate(computed) if is_computed) or "none"
