"""The rows of the GPU figures: our methods and others' caches, each with how it is switched on.

Every cache is given thresholds that no signal exceeds, and a correction no weight, so that which
calls are reused follows from the schedule alone: the first ones are computed, then those that the
method forces.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmark.models.names import CORRECTED, OURS, UNCACHED
from benchmark.peers import enabled, peer_config
from xfuser_adacorr import CacheConfig, disable_cache, enable_cache

NEVER_EXCEEDED = 1e12
"""A threshold or tolerance that no signal of a finite tensor reaches."""
DBCACHE_THRESHOLD = 0.99
"""From 1 on DBCache reuses without comparing anything, which no threshold in use does."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """StepPlan of a generation, and how many at its start every cache that can computes."""

    number: int
    computed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRow:
    """One line of the table."""

    name: str
    enabled: Callable[[Any, StepPlan], AbstractContextManager[None]]
    """(pipeline, steps): within, the cache is on; afterwards the pipeline is as it was."""
    has_trace: bool = False
    """Whether `cache_summary` tells which calls were reused."""
    fullgraph: bool = True
    """Whether the blocks must compile into one graph each; else graph breaks are counted."""


def our_config(name: str, steps: StepPlan) -> CacheConfig:
    """Method ``name``, which computes the schedule's first calls and those it always forces."""
    base = name.removesuffix(CORRECTED)
    options: dict[str, Any] = {"warmup_steps": steps.computed}
    if base == "Ada":
        options["codebook"] = {NEVER_EXCEEDED: steps.number}
    elif base != "Auto":
        options["rel_l1_thresh"] = NEVER_EXCEEDED
    if base == "Auto" or name != base:
        options |= {"adacorr_tolerance": NEVER_EXCEEDED, "adacorr_gamma": 0.0}
    return CacheConfig.from_name(name, **options)


@contextmanager
def _ours(name: str, pipe: Any, steps: StepPlan) -> Iterator[None]:
    enable_cache(pipe, our_config(name, steps))
    try:
        yield
    finally:
        disable_cache(pipe)


def _our_row(name: str) -> CacheRow:
    return CacheRow(name=name, enabled=partial(_ours, name), has_trace=True)


def _peer_row(name: str, peer: str, options: Callable[[StepPlan], dict[str, Any]]) -> CacheRow:
    def under_peer(pipe: Any, steps: StepPlan) -> AbstractContextManager[None]:
        return enabled(pipe, peer_config(peer, options(steps)), steps.number)

    return CacheRow(name=name, enabled=under_peer, fullgraph=False)


def _taylor_seer(steps: StepPlan) -> dict[str, Any]:
    return {
        "disable_cache_before_step": steps.computed,
        "cache_interval": steps.number,
        "taylor_factors_dtype": torch.bfloat16,  # diffusers' default
    }


def _db_cache(steps: StepPlan) -> dict[str, Any]:
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": DBCACHE_THRESHOLD,
        "max_warmup_steps": steps.computed,
    }


def _xfuser(steps: StepPlan) -> dict[str, Any]:
    return {"rel_l1_thresh": NEVER_EXCEEDED}


_ATTENTIONS_ALONE = {"cache_identifiers": None, "skip_predict_identifiers": None}
PEERS = {
    "flux": (
        _peer_row(
            "diffusers FirstBlockCache",
            "diffusers:FirstBlockCache",
            lambda _: {"threshold": NEVER_EXCEEDED},
        ),
        _peer_row(
            "diffusers TaylorSeer",
            "diffusers:TaylorSeer",
            lambda steps: {**_taylor_seer(steps), **_ATTENTIONS_ALONE},
        ),
        _peer_row("diffusers TaylorSeer lite", "diffusers:TaylorSeerLite", _taylor_seer),
        _peer_row("cache-dit DBCache F1B0", "cache-dit:DBCache", _db_cache),
        _peer_row("xfuser fbcache", "xfuser:fbcache", _xfuser),
        _peer_row("xfuser teacache", "xfuser:teacache", _xfuser),
    ),
    "opensora": (_peer_row("diffusers TaylorSeer", "diffusers:TaylorSeer", _taylor_seer),),
}
"""Others' caches that run on a model. TaylorSeer's default on FLUX caches attentions alone; `lite`
skips whole blocks and extrapolates the output; on Open-Sora it caches all modules of a block."""


def rows_of(model: str) -> tuple[CacheRow, ...]:
    """All rows of a model, the uncached one first."""
    uncached = CacheRow(name=UNCACHED, enabled=lambda *_: nullcontext())
    return (uncached, *(_our_row(name) for name in OURS), *PEERS[model])
