"""The rows of the GPU figures: our methods and others' caches, each with how it is switched on.

Every cache is given thresholds that no signal exceeds, so that which calls are reused follows from
the schedule alone: the first ones are computed, then those that the method forces.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch import nn

from xfuser_adacorr import CacheConfig, disable_cache, enable_cache
from xfuser_adacorr.config import CORRECTED_SUFFIX, METHODS

NEVER_EXCEEDED = 1e12
"""A threshold or tolerance that no signal of a finite tensor reaches."""
UNCACHED = "None"
OURS = (*METHODS, *(name + CORRECTED_SUFFIX for name in METHODS if name != "Auto"))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a generation, and how many at its start every cache that can computes."""

    steps: int
    computed: int


def _nothing(pipe: Any, schedule: Schedule | None = None) -> None:
    """What the uncached row needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    enable: Callable[[Any, Schedule], None]
    """(pipeline, schedule): switch the cache on."""
    disable: Callable[[Any], None]
    restart: Callable[[Any, Schedule], None] = _nothing
    """Before each generation, for caches that do not notice a new one."""
    has_trace: bool = False
    """Whether `cache_summary` tells which calls were reused."""
    fullgraph: bool = True
    """Whether the blocks must compile into one graph each; else graph breaks are counted."""


def our_config(name: str, schedule: Schedule) -> CacheConfig:
    """Method ``name``, which computes the schedule's first calls and those it always forces."""
    base = name.removesuffix(CORRECTED_SUFFIX)
    options: dict[str, Any] = {"warmup_steps": schedule.computed}
    if base == "Ada":
        options["codebook"] = {NEVER_EXCEEDED: schedule.steps}
    elif base != "Auto":
        options["rel_l1_thresh"] = NEVER_EXCEEDED
    if base == "Auto" or name != base:
        options |= {"adacorr_tolerance": NEVER_EXCEEDED, "adacorr_lambda": 0.0}
    return CacheConfig.from_name(name, **options)


def _our_row(name: str) -> Row:
    def enable(pipe: Any, schedule: Schedule) -> None:
        enable_cache(pipe, our_config(name, schedule))

    return Row(name=name, enable=enable, disable=disable_cache, has_trace=True)


def _diffusers_row(name: str, config: Callable[[Schedule], Any]) -> Row:
    return Row(
        name=name,
        enable=lambda pipe, schedule: pipe.transformer.enable_cache(config(schedule)),
        disable=lambda pipe: pipe.transformer.disable_cache(),
        fullgraph=False,
    )


def _taylor_seer(schedule: Schedule, **options: Any) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        disable_cache_before_step=schedule.computed, cache_interval=schedule.steps, **options
    )


class _DBCache:
    """cache-dit's DBCache.

    Disabled, it leaves a forward of its own on the transformer and the block lists in another order
    among its modules, by which diffusers finds the first block: both are put back.
    """

    THRESHOLD = 0.99
    """From 1 on it reuses without comparing anything, which no threshold in use does."""

    def __init__(self) -> None:
        self._attributes: set[str] = set()
        self._modules: list[str] = []

    def enable(self, pipe: Any, schedule: Schedule) -> None:
        import cache_dit

        self._attributes = set(vars(pipe.transformer))
        self._modules = list(pipe.transformer._modules)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=self.THRESHOLD,
            max_warmup_steps=schedule.computed,
            num_inference_steps=schedule.steps,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    def disable(self, pipe: Any) -> None:
        import cache_dit

        cache_dit.disable_cache(pipe)
        for name in set(vars(pipe.transformer)) - self._attributes:
            delattr(pipe.transformer, name)
        modules = pipe.transformer._modules
        for name in self._modules:
            modules[name] = modules.pop(name)


class _XFuserCache:
    """xfuser's in-tree cache: it puts one module in the place of both block lists.

    It keeps the end of one generation for the start of the next, so each one gets a new cache.
    """

    LISTS = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, method: str) -> None:
        self.method = method
        self._lists: dict[str, nn.Module] = {}

    def enable(self, pipe: Any, schedule: Schedule) -> None:
        _start_xfuser(pipe.transformer.dtype)
        from xfuser.model_executor.cache.adapters.flux import apply_fbcache, apply_teacache

        apply = {"fbcache": apply_fbcache, "teacache": apply_teacache}[self.method]
        self._lists = {name: getattr(pipe.transformer, name) for name in self.LISTS}
        apply(pipe.transformer, rel_l1_thresh=NEVER_EXCEEDED, num_steps=schedule.steps)

    def disable(self, pipe: Any) -> None:
        for name, blocks in self._lists.items():
            setattr(pipe.transformer, name, blocks)
        self._lists = {}

    def restart(self, pipe: Any, schedule: Schedule) -> None:
        self.disable(pipe)
        self.enable(pipe, schedule)


def _start_xfuser(dtype: Any) -> None:
    """xfuser's process groups, which its caches ask for even in a single process."""
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import Degrees, start
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.platform import load_xfuser

    load_xfuser()
    from xfuser.core.distributed import model_parallel_is_initialized

    if model_parallel_is_initialized():
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": "29512"}.items():
        os.environ.setdefault(name, value)
    start(Degrees(), dtype=dtype)


def _object_row(name: str, cache: Any) -> Row:
    restart = getattr(cache, "restart", _nothing)
    return Row(
        name=name, enable=cache.enable, disable=cache.disable, restart=restart, fullgraph=False
    )


_STDIT3_MODULES = (r"(spatial|temporal)_blocks\.\d+\.(attn|cross_attn|mlp)",)
PEERS = {
    "flux": (
        _diffusers_row(
            "diffusers FirstBlockCache", lambda _: FirstBlockCacheConfig(threshold=NEVER_EXCEEDED)
        ),
        _diffusers_row("diffusers TaylorSeer", _taylor_seer),
        _diffusers_row("diffusers TaylorSeer lite", partial(_taylor_seer, use_lite_mode=True)),
        _object_row("cache-dit DBCache F1B0", _DBCache()),
        _object_row("xfuser fbcache", _XFuserCache("fbcache")),
        _object_row("xfuser teacache", _XFuserCache("teacache")),
    ),
    "opensora": (
        _diffusers_row(
            "diffusers TaylorSeer", partial(_taylor_seer, cache_identifiers=_STDIT3_MODULES)
        ),
    ),
}
"""Others' caches that run on a model. TaylorSeer's default on FLUX caches attentions alone; `lite`
skips whole blocks and extrapolates the output; Open-Sora's rows name its modules."""


def rows_of(model: str) -> tuple[Row, ...]:
    """All rows of a model, the uncached one first."""
    uncached = Row(name=UNCACHED, enable=_nothing, disable=_nothing)
    return (uncached, *(_our_row(name) for name in OURS), *PEERS[model])
