"""The settings of each peer that a sweep tries, beside its recommended ones.

They spread over the compute fractions at which methods are compared, as far as a peer gets there.
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmark.peers.paths import SHARES

Settings = list[dict[str, Any]]


def _over(knob: str, values: Sequence[Any]) -> Settings:
    return [{knob: value} for value in values]


def _mag_cache(thresholds: Sequence[float], steps: int) -> Settings:
    tried = (
        (0.03, 2, 0.2),
        (0.12, 4, 0.2),
        (0.24, 4, 0.1),
        (0.24, 6, 0.1),
        (0.6, 8, 0.1),
        (1.5, 12, 0.1),
    )
    names = ("threshold", "max_skip_steps", "retention_ratio")
    return [dict(zip(names, values, strict=True)) for values in tried]


def _sea_cache(thresholds: Sequence[float], steps: int) -> Settings:
    tried = ((0.1, 2), (0.25, 0), (0.5, 0), (1.0, 0), (2.0, 0), (2.0, 2), (4.0, 4))
    return [{"threshold": t, "max_consecutive_cached": longest} for t, longest in tried]


def _attention(thresholds: Sequence[float], steps: int) -> Settings:
    # the first step's timestep must be outside: FasterCache has nothing to skip it with
    tried = ((3, (100, 800)), (2, (-1, 981)), (4, (-1, 981)), (8, (-1, 981)))
    return [{"skip_range": n, "timestep_range": timesteps} for n, timesteps in tried]


def _db_cache(threshold: float, warmup: int, in_a_row: int) -> dict[str, Any]:
    return {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": warmup,
        "max_continuous_cached_steps": in_a_row,
        "residual_diff_threshold": threshold,
    }


ALWAYS = 100.0
"""A threshold that nothing exceeds: the most cached steps in a row alone decide."""


def _plain_db_cache(thresholds: Sequence[float], steps: int) -> Settings:
    published = _db_cache(0.12, 4, 3)
    return [published, *(_db_cache(threshold, 2, -1) for threshold in thresholds)]


def _forecast_db_cache(thresholds: Sequence[float], steps: int) -> Settings:
    published = _db_cache(0.12, 4, 3)
    dynamic = [_db_cache(2 * threshold, 3, 5) for threshold in thresholds[::2]]
    return [published, *dynamic, *(_db_cache(ALWAYS, 3, n) for n in (1, 2, 3, 4, 6, 8))]


def _steps_mask(thresholds: Sequence[float], steps: int) -> Settings:
    return [
        {**_db_cache(ALWAYS, 1, -1), "mask_policy": policy, "steps_computation_policy": "static"}
        for policy in ("slow", "medium", "fast", "ultra")
    ]


def _intervals(thresholds: Sequence[float], steps: int) -> Settings:
    return _over("cache_interval", (2, 3, 4, 5, 6, 8))


def _budgets(**more: Any) -> Callable[[Sequence[float], int], Settings]:
    return lambda thresholds, steps: [{"share": share, **more} for share in SHARES]


def _dp_cache(thresholds: Sequence[float], steps: int) -> Settings:
    return [{"share": share, "order": order} for order in (1, 2) for share in SHARES]


def _spectrum(thresholds: Sequence[float], steps: int) -> Settings:
    few = steps <= 30
    fast = [{"warm_up": 5, "growth": 3.0}]  # published, too; the others for other compute
    warm_up = 3 if few else 5
    swept = [
        {"warm_up": warm_up, "growth": growth, "blend": blend}
        for blend in (1.0, 0.5)
        for growth in ((0.1, 0.3, 0.75, 1.5, 3.0) if few else (0.05, 0.15, 0.3, 0.75, 1.5))
    ]
    return [*fast, *swept]


def _l2p(thresholds: Sequence[float], steps: int) -> Settings:
    return [*_over("interval", (6, 7, 8, 10, 16)), *_over("share", SHARES)]


def _di_cache(thresholds: Sequence[float], steps: int) -> Settings:
    tried = (0.1, 0.2, 0.8)
    return [
        *({"threshold": threshold, "retained": 0.2} for threshold in tried),
        *({"threshold": threshold, "retained": 0.0} for threshold in (0.05, 0.1, 0.2, 0.4, 0.8)),
    ]


def _tc_pade(thresholds: Sequence[float], steps: int) -> Settings:
    return [
        {"interval": interval, "turn": turn, "start": 2 if steps <= 30 else 4}
        for turn in (1.4, 0.6)
        for interval in (2, 3, 4, 6)
    ]


_SETTINGS: dict[str, Callable[[Sequence[float], int], Settings]] = {
    "diffusers:FirstBlockCache": lambda thresholds, steps: _over("threshold", thresholds),
    "diffusers:TaylorSeer": _intervals,
    "diffusers:TaylorSeer2": _intervals,
    "diffusers:TaylorSeerLite": _intervals,
    "diffusers:TaylorSeerLite2": _intervals,
    "diffusers:MagCache": _mag_cache,
    "diffusers:SeaCache": _sea_cache,
    "diffusers:FasterCache": _attention,
    "diffusers:PyramidAttentionBroadcast": _attention,
    "cache-dit:DBCache": _plain_db_cache,
    "cache-dit:DBCache+TaylorSeer": _forecast_db_cache,
    "cache-dit:DBCache+TaylorSeer2": _forecast_db_cache,
    "cache-dit:DBCache+FoCa": _forecast_db_cache,
    "cache-dit:DBCache+DMD": _forecast_db_cache,
    "cache-dit:StepsMask+TaylorSeer": _steps_mask,
    # its reference lags a step behind, so that it needs looser thresholds for the same compute
    "xfuser:fbcache": lambda thresholds, steps: _over(
        "rel_l1_thresh", (*thresholds, 1.5 * thresholds[-1], 2.5 * thresholds[-1])
    ),
    # TeaCache's published thresholds for FLUX, and looser ones
    "paper:MeanCache": _budgets(exponent=4.0),
    "paper:DPCache": _dp_cache,
    "paper:Spectrum": _spectrum,
    "paper:L2P": _l2p,
    "paper:OLSS": _budgets(),
    "paper:BudCache": _budgets(),
    "paper:BAG": _budgets(),
    "paper:EasyCache": lambda thresholds, steps: _over("threshold", (0.05, 0.1, 0.4, 0.8, 1.6)),
    "paper:LazyCache": lambda thresholds, steps: _over("threshold", (0.05, 0.1, 0.4, 0.8, 1.6)),
    "paper:DiCache": _di_cache,
    "paper:TCPade": _tc_pade,
    "xfuser:teacache": lambda thresholds, steps: _over("rel_l1_thresh", (0.25, 0.4, 0.6, 0.8, 1.2)),
}


def settings_of(name: str, thresholds: Sequence[float], steps: int) -> Settings:
    """What a sweep tries of a peer; ``thresholds`` are those of our ``Fb``."""
    return _SETTINGS[name](thresholds, steps)
