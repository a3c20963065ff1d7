"""Runs rows, in this process or in several, and keeps each as soon as it is finished."""

import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmark.models.families import FAMILIES
from benchmark.models.loading import (
    check_texts,
    entry_text,
    load_pipeline,
    load_prompts,
    picture_shape,
)
from benchmark.models.package import computed_calls
from benchmark.peers import PeerConfig
from benchmark.run.generate import Generated, generate_row, time_rows
from benchmark.run.parallel import parallelised
from benchmark.run.rows import Row, ode_row, uncached_row
from benchmark.run.store import Store
from benchmark.score.samples import samples
from benchmark.score.scoring import Scorer
from benchmark.settings import Settings

TIMED_PROMPTS = 2


class Workbench:
    """What one process needs to make and score rows."""

    def __init__(self, settings: Settings, engine_config: Any = None) -> None:
        use_threads(settings)
        self.settings = settings
        self.family = FAMILIES[settings.model_type]
        self.store = Store(settings.output_dir)
        self.entries = load_prompts(settings)
        pipe = load_pipeline(settings)
        check_texts(settings, pipe, self.entries)
        self.shape = picture_shape(settings, pipe)
        self.pipe = parallelised(pipe, engine_config)
        self.scorer = Scorer(settings, self.shape, [entry_text(entry) for entry in self.entries])

    def run(self, row: Row, on_picture: Callable[[], None] = lambda: None) -> None:
        """Make, score and keep one row; the uncached row of its steps must have been kept."""
        made = generate_row(self.pipe, self.settings, row, self.entries, on_picture)
        if row.is_ode:
            self.store.save_pictures(row.key, made.pictures)
            return
        reference = None if row.is_reference else self._reference(row)
        ode = self._ode(row) if self.settings.ode_reference else None
        uncached = self.store.row(self.uncached_row(row.reference_steps).key)
        result = {
            **row.to_dict(),
            **cost(row, made, uncached),
            **self.scorer.score(made.pictures, reference, ode),
            "trace": None,
            "computed_calls": None,
        }
        if self.settings.mode == "pareto":
            result["samples"] = samples(self.scorer, made.pictures, reference, ode)
        if row.is_reference:
            self.store.save_pictures(row.key, made.pictures)
        if self.settings.mode == "comparison":
            self.store.save_pngs(row.key, made.pictures)
            if made.summaries:
                first = made.summaries[0]
                result["trace"] = self.store.save_trace(row.key, first.trace)
                result["computed_calls"] = [int(x) for x in computed_calls(first)]
        self.store.save_row(row.key, result)

    def _reference(self, row: Row) -> Tensor:
        return self._kept(self.uncached_row(row.reference_steps))

    def _ode(self, row: Row) -> Tensor:
        return self._kept(ode_row(row.reference_steps, self.family.ode))

    def _kept(self, row: Row) -> Tensor:
        pictures = self.store.pictures(row.key)
        if pictures is None:
            raise RuntimeError(f"the row {row.name} of {row.reference_steps} steps comes first")
        return pictures

    def uncached_row(self, steps: int) -> Row:
        """The row that all rows with these reference steps are compared with."""
        return uncached_row(steps, self.family.solvers[0])

    def ode_rows(self) -> list[Row]:
        """The ODE's solutions that the rows need."""
        counts = self.settings.num_inference_steps if self.settings.ode_reference else ()
        return list(dict.fromkeys(ode_row(steps, self.family.ode) for steps in counts))

    def is_kept(self, row: Row) -> bool:
        if row.is_ode:
            return self.store.pictures(row.key) is not None
        return self.store.row(row.key) is not None


def threads(settings: Settings) -> int:
    return settings.threads or (1 if settings.workers > 1 else torch.get_num_threads())


def use_threads(settings: Settings) -> None:
    torch.set_num_threads(threads(settings))


def cost(row: Row, made: Generated, uncached: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compute and memory, averaged over the pictures (memory: the most).

    The compute fraction is that of the FLOPs executed in the denoisers. Several processes, which
    share them, do not count them: there it is that of the computed calls, or of the steps.

    Args:
        row: what was made.
        made: the pictures, and what they cost.
        uncached: the finished row of the uncached run; None while that is ``row``.
    """
    flops = None if made.flops is None else made.flops / len(made.pictures)
    if flops is not None:
        fraction = 1.0 if uncached is None else flops / uncached["denoiser_flops"]
    elif made.summaries:
        fraction = fmean(summary.compute_fraction for summary in made.summaries)
    else:
        fraction = row.num_inference_steps / row.reference_steps
    is_peer = isinstance(row.config, PeerConfig)
    hit_rate, memory = (None, None) if is_peer else (0.0, 0)
    if made.summaries:
        hit_rate = fmean(summary.hit_rate for summary in made.summaries)
        memory = max(summary.cache_memory_bytes for summary in made.summaries)
    return {
        "hit_rate": hit_rate and round(hit_rate, 6),
        "compute_fraction": round(fraction, 6),
        "cache_memory_bytes": memory,
        "denoiser_flops": flops,
    }


def run_rows(bench: Workbench, rows: Sequence[Row]) -> None:
    """Run the rows that the store does not have, references first."""
    missing = [row for row in rows if not bench.is_kept(row)]
    if not missing:
        return
    first = [row for row in missing if row.is_ode]
    second = [row for row in missing if row.is_reference]
    rest = [row for row in missing if row not in first and row not in second]
    total = len(missing) * len(bench.entries)
    with tqdm(total=total, desc="pictures", unit="picture", smoothing=0.05) as bar:
        for batch in (first, second, rest):
            if bench.settings.workers == 1 or len(batch) < 2:
                for row in batch:
                    bar.set_postfix_str(row.name)
                    bench.run(row, bar.update)
            else:
                _run_in_processes(bench, batch, bar)


def _run_in_processes(bench: Workbench, rows: Sequence[Row], bar: tqdm) -> None:
    workers = min(bench.settings.workers, len(rows))
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(bench.settings,)
    )
    try:
        jobs = [pool.submit(_run_in_worker, row) for row in rows]
        for job in as_completed(jobs):
            job.result()
            bar.update(len(bench.entries))
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Workbench | None = None


def _start_worker(settings: Settings) -> None:
    global _worker
    # An interrupt ends the main process, which lets the rows in progress finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = Workbench(settings)


def _run_in_worker(row: Row) -> None:
    assert _worker is not None
    _worker.run(row)


def measure_latencies(bench: Workbench, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds per picture of each row, all from one run, kept for a resumed report."""
    kept = bench.store.latencies()
    if all(row.key in kept for row in rows):
        return kept
    settings = bench.settings
    rounds = (settings.warmup + settings.repetitions) * len(rows)
    with tqdm(total=rounds, desc="latency", unit="turn") as bar:
        seconds = time_rows(bench.pipe, settings, rows, bench.entries[:TIMED_PROMPTS], bar.update)
    bench.store.save_latencies(seconds)
    return seconds


def latency_fields(seconds: Sequence[float], uncached: Sequence[float]) -> dict[str, Any]:
    """The latency part of a results row; speedup is a quotient of medians."""
    middle = median(seconds)
    return {
        "latency_s": {
            "median": round(middle, 5),
            "min": round(min(seconds), 5),
            "max": round(max(seconds), 5),
            "runs": len(seconds),
        },
        "fps": round(1 / middle, 4),
        "speedup": round(median(uncached) / middle, 4),
    }
