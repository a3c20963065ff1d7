"""Makes one row's pictures with the pipeline, as a user would: one prompt a call."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.loading import call_arguments, entry_text, load_prompts
from benchmark.models.schedulers import make_scheduler
from benchmark.peers import PeerConfig, enabled
from benchmark.run.flops import counted_flops, denoisers
from benchmark.run.parallel import (
    gathered,
    get_scheduler,
    hear,
    is_joined,
    own_entry,
    replicas,
    set_scheduler,
    tell,
)
from benchmark.run.rows import Row
from benchmark.settings import Settings
from xfuser_adacorr import cache_summary, disable_cache, enable_cache

Entries = Sequence[dict[str, Any]]


@dataclass(slots=True)
class Generated:
    """A row's pictures and what they cost; one summary per picture if the row has a cache."""

    pictures: Tensor
    """float32 [N, 3, H, W] in [0, 1], or clips [N, F, 3, H, W]."""
    summaries: list[Any] = field(default_factory=list)
    flops: int | None = None
    """Executed in the denoisers, of all pictures; None where several processes share them."""


@contextmanager
def prepared(pipe: Any, row: Row) -> Iterator[None]:
    """The pipeline with the row's solver and cache; afterwards it is as it was.

    Raises:
        BenchmarkError: the pipeline cannot run under the row's cache.
    """
    tell("prepare", row)
    own = get_scheduler(pipe)
    set_scheduler(pipe, make_scheduler(row.solver, own, row.reference_steps))
    try:
        with _under_cache(pipe, row):
            yield
            tell("restore")
    finally:
        set_scheduler(pipe, own)


def _under_cache(pipe: Any, row: Row) -> AbstractContextManager[None]:
    if row.config is None:
        return nullcontext()
    if isinstance(row.config, PeerConfig):
        return enabled(pipe, row.config, row.num_inference_steps)
    return _under_own_cache(pipe, row)


@contextmanager
def _under_own_cache(pipe: Any, row: Row) -> Iterator[None]:
    try:
        enable_cache(pipe, row.config)
    except (ValueError, FileNotFoundError) as error:
        raise BenchmarkError(f"{row.name}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        disable_cache(pipe)


@torch.no_grad()
def make_picture(pipe: Any, settings: Settings, entry: dict[str, Any], steps: int) -> Tensor | None:
    """One picture, float32 [3, H, W] in [0, 1] on the CPU, or clip [F, 3, H, W].

    The noise is seeded on the CPU. None on a rank whose pipeline leaves the picture to another.
    """
    output = pipe(
        **call_arguments(settings, pipe, entry_text(entry)),
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(entry["seed"]),
        output_type="pt",
    )
    if output is None:
        return None
    return FAMILIES[settings.model_type].output(output).float().cpu()


def make_group(
    pipe: Any, settings: Settings, entries: Entries, steps: int, cached: bool
) -> list[tuple[Tensor, Any]]:
    """(picture, summary if ``cached``) of each entry, of which there is one a replica at most."""
    tell("pictures", entries, steps, cached)
    entry, picture, summary = own_entry(entries), None, None
    if entry is not None:
        picture = make_picture(pipe, settings, entry, steps)
        summary = cache_summary(pipe) if cached else None
    return gathered(picture, summary)


def groups(entries: Entries) -> Iterator[Entries]:
    """As many entries at a time as there are replicas."""
    for start in range(0, len(entries), replicas()):
        yield entries[start : start + replicas()]


def teach(pipe: Any, settings: Settings, row: Row) -> None:
    """Let a row's method that learns do so, from development prompts; it is enabled."""
    count = getattr(row.config, "learn", None)
    if count is not None:
        chosen = replace(settings, split="development", num_prompts=count)
        for entry in load_prompts(chosen):
            make_picture(pipe, settings, entry, row.num_inference_steps)


def generate_row(
    pipe: Any,
    settings: Settings,
    row: Row,
    entries: Entries,
    on_picture: Callable[[], None] = lambda: None,
) -> Generated:
    """The row's picture of every prompt."""
    pictures, summaries = [], []
    cached = row.config is not None and not isinstance(row.config, PeerConfig)
    counted = nullcontext() if is_joined() else counted_flops(denoisers(pipe))
    with prepared(pipe, row):
        teach(pipe, settings, row)
        with counted as flops:
            for group in groups(entries):
                made = make_group(pipe, settings, group, row.num_inference_steps, cached)
                for picture, summary in made:
                    pictures.append(picture)
                    if cached:
                        summaries.append(summary)
                    on_picture()
    return Generated(torch.stack(pictures), summaries, flops and flops.total)


def follow(pipe: Any, settings: Settings) -> None:
    """Do what rank 0 tells, until it stops."""
    with ExitStack() as row:
        while True:
            command, *arguments = hear()
            if command == "prepare":
                row.enter_context(prepared(pipe, *arguments))
            elif command == "restore":
                row.close()
            elif command == "pictures":
                make_group(pipe, settings, *arguments)
            else:
                return


def time_rows(
    pipe: Any,
    settings: Settings,
    rows: Sequence[Row],
    entries: Entries,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per picture of every row, by its key, from rounds that visit all rows in turn.

    The whole pipeline call is timed, text encoding and decoding included. In every round each row
    makes one untimed picture (first calls after a change of method are slower), then a timed
    picture of each entry. The first `settings.warmup` rounds are not kept.
    """
    seconds: dict[str, list[float]] = {row.key: [] for row in rows}
    for turn in range(settings.warmup + settings.repetitions):
        for row in rows:
            with prepared(pipe, row):
                teach(pipe, settings, row)
                steps = row.num_inference_steps
                make_group(pipe, settings, entries[: replicas()], steps, False)
                for group in groups(entries):
                    _synchronise()
                    start = time.perf_counter()
                    make_group(pipe, settings, group, steps, False)
                    _synchronise()
                    if turn >= settings.warmup:
                        elapsed = (time.perf_counter() - start) / len(group)
                        seconds[row.key] += [elapsed] * len(group)
            on_round()
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
