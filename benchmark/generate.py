"""Makes one row's pictures with the pipeline, as a user would: one prompt a call."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmark.families import FAMILIES
from benchmark.loading import picture_shape
from benchmark.plan import Row
from benchmark.schedulers import make_scheduler
from benchmark.settings import Settings
from xfuser_adacorr import cache_summary, disable_cache, enable_cache

Entries = Sequence[dict[str, Any]]


@dataclass(slots=True)
class Generated:
    """A row's pictures and what they cost; one summary per picture if the row has a cache."""

    pictures: Tensor
    """float32 [N, 3, H, W] in [0, 1]."""
    summaries: list[Any] = field(default_factory=list)


@contextmanager
def prepared(pipe: Any, row: Row) -> Iterator[None]:
    """The pipeline with the row's solver and cache; afterwards it is as it was."""
    own = pipe.scheduler
    pipe.scheduler = make_scheduler(row.solver, own)
    try:
        if row.config is not None:
            enable_cache(pipe, row.config)
        try:
            yield
        finally:
            if row.config is not None:
                disable_cache(pipe)
    finally:
        pipe.scheduler = own


@torch.no_grad()
def make_picture(pipe: Any, settings: Settings, entry: dict[str, Any], steps: int) -> Tensor:
    """One picture, float32 [3, H, W] in [0, 1] on the CPU; the noise is seeded on the CPU."""
    height, width = picture_shape(settings, pipe)
    options = FAMILIES[settings.model_type].call_options(pipe)
    if settings.true_cfg_scale > 1:
        options |= {"negative_prompt": "", "true_cfg_scale": settings.true_cfg_scale}
    output = pipe(
        entry["prompt"],
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(entry["seed"]),
        output_type="pt",
        **options,
    )
    return output.images[0].float().cpu()


def generate_row(
    pipe: Any,
    settings: Settings,
    row: Row,
    entries: Entries,
    on_picture: Callable[[], None] = lambda: None,
) -> Generated:
    """The row's picture of every prompt."""
    pictures, summaries = [], []
    with prepared(pipe, row):
        for entry in entries:
            pictures.append(make_picture(pipe, settings, entry, row.num_inference_steps))
            if row.config is not None:
                summaries.append(cache_summary(pipe))
            on_picture()
    return Generated(torch.stack(pictures), summaries)


def time_rows(
    pipe: Any,
    settings: Settings,
    rows: Sequence[Row],
    entries: Entries,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per picture of every row, by its key, from rounds that visit all rows in turn.

    The whole pipeline call is timed, text encoding and decoding included. In every round each row
    makes one short untimed picture (first calls after a change of method are slower), then a
    timed picture of each entry. The first `settings.warmup` rounds are not kept.
    """
    seconds: dict[str, list[float]] = {row.key: [] for row in rows}
    for turn in range(settings.warmup + settings.repetitions):
        for row in rows:
            with prepared(pipe, row):
                make_picture(pipe, settings, entries[0], 4)
                for entry in entries:
                    _synchronise()
                    start = time.perf_counter()
                    make_picture(pipe, settings, entry, row.num_inference_steps)
                    _synchronise()
                    if turn >= settings.warmup:
                        seconds[row.key].append(time.perf_counter() - start)
            on_round()
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
