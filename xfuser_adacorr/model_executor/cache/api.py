"""The verbs: enable, disable, reset and summarise a cache on a pipeline or a transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from xfuser_adacorr.config import TARGETS, CacheConfig
from xfuser_adacorr.core.distributed import DecisionScope

from .clock import SchedulerClock, TimestepClock
from .context import CacheSummary
from .diffusers_adapters.registry import find_family
from .engine import CacheEngine, engine_of
from .intercept import handler_of
from .methods.replay import recorded_config, trace_of
from .per_sample import PerSampleEngine
from .samplers import check_sampler, unwrapped
from .xfuser_adapters.pipefusion import PipelineStage, StageClock
from .xfuser_adapters.scope import check_config, find_scope, find_stage


def _transformer_of(x: Any) -> nn.Module:
    """The transformer of a pipeline, or the transformer itself."""
    transformer = x if isinstance(x, nn.Module) else getattr(x, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"expected a transformer or a pipeline with a transformer, got {type(x).__name__}"
        )
    return transformer


def _clock_for(
    x: Any, scheduler: Any, config: CacheConfig, stage: PipelineStage | None
) -> SchedulerClock | TimestepClock:
    if scheduler is None and isinstance(x, nn.Module):
        if stage is not None:
            raise ValueError("scheduler must be given under PipeFusion, or enable it on a pipeline")
        target = next((name for name in TARGETS if getattr(config, name) is not None), None)
        if target is not None and config.num_steps is None:
            raise ValueError(
                f"num_steps must be given for {target} on a transformer without its scheduler (or "
                "give the scheduler)"
            )
        return TimestepClock(config.num_steps)

    def get_stepper() -> Any:
        return scheduler if scheduler is not None else x.scheduler

    current = unwrapped(get_stepper())
    if not hasattr(current, "timesteps") or not hasattr(current, "config"):
        raise ValueError(
            f"scheduler must have timesteps and a config, as diffusers' schedulers do; "
            f"got {type(current).__name__}"
        )
    if config.per_sample and current is not get_stepper():
        raise ValueError("per_sample must be False under xfuser's wrappers of the scheduler")
    if config.forecasts_output:
        check_sampler(current)
    return SchedulerClock(get_stepper) if stage is None else StageClock(get_stepper, stage)


def _scope_for(
    transformer: nn.Module, scope: DecisionScope | None, check_ranks: bool
) -> DecisionScope:
    if not isinstance(check_ranks, bool):
        raise TypeError(f"check_ranks must be True or False, got {check_ranks!r}")
    if scope is None:
        return find_scope(transformer, check_ranks=check_ranks)
    if not isinstance(scope, DecisionScope):
        raise TypeError(f"scope must be a DecisionScope or None, got {scope!r}")
    return replace(scope, check_ranks=scope.check_ranks or check_ranks)


def enable_cache(
    x: Any,
    config: CacheConfig | str = "Auto",
    *,
    scheduler: Any = None,
    scope: DecisionScope | None = None,
    check_ranks: bool = False,
    **options: Any,
) -> Any:
    """Enable a cache on a diffusers or xfuser pipeline or transformer, in place.

    On several devices every rank has to enable it, with the same arguments.

    Args:
        x: pipeline (its scheduler tells the steps) or transformer.
        config: a `CacheConfig`, or a method's name such as ``"Fb"`` or ``"Fast+AdaCorrection"``.
        scheduler: for a bare transformer, the scheduler that samples with it. Without it the place
            in the schedule is inferred from the timesteps, and AdaCorrection assumes Euler steps
            ``x <- x + dsigma * output``. During a run AdaCorrection may take over its ``step``.
        scope: ranks that have to decide alike, where another engine than xfuser splits the samples;
            None: those of xfuser's parallel state that share a sample.
        check_ranks: compare the decisions of these ranks in every call and raise
            `RankMismatchError` on all of them where one differs, instead of hanging.
        options: fields of `CacheConfig`, with a method's name only.

    Returns ``x``. Raises `ValueError` for unknown methods, options, transformer classes,
    schedulers that AdaCorrection cannot correct under, calibrations of another model or traces that
    cannot be replayed, ``per_sample`` where samples cannot be told apart, and if a cache is already
    enabled; `TypeError` for wrong types; `FileNotFoundError` for files that are not there.
    """
    if isinstance(config, str):
        config = CacheConfig.from_name(config, **options)
    elif not isinstance(config, CacheConfig):
        raise TypeError(f"config must be a CacheConfig or a method's name, got {config!r}")
    elif options:
        raise TypeError(f"options {sorted(options)} belong into the CacheConfig given")
    transformer = _transformer_of(x)
    if is_cache_enabled(x):
        raise ValueError("a cache is already enabled on this transformer; call disable_cache first")
    family = find_family(transformer)
    decision_scope = _scope_for(transformer, scope, check_ranks)
    stage = find_stage(transformer)
    check_config(config, decision_scope, stage)
    trace = trace_of(config)
    if trace is not None:
        config = recorded_config(trace, config.num_steps)
        check_config(config, decision_scope, stage)
    clock = _clock_for(x, scheduler, config, stage)
    engine = PerSampleEngine if config.per_sample else CacheEngine
    engine(transformer, family, config, clock, decision_scope, stage, trace).install()
    return x


def disable_cache(x: Any) -> None:
    """Give the transformer back exactly as it was; `ValueError` if no cache is enabled."""
    engine_of(_transformer_of(x)).uninstall()


def reset_cache(x: Any) -> None:
    """Forget the running generation; the next call begins a new one."""
    engine_of(_transformer_of(x)).reset()


def is_cache_enabled(x: Any) -> bool:
    """Whether this or one of diffusers' own caches is enabled."""
    transformer = _transformer_of(x)
    return handler_of(transformer) is not None or bool(
        getattr(transformer, "is_cache_enabled", False)
    )


def cache_summary(x: Any) -> CacheSummary:
    """What the running generation, or the last one, cost and decided."""
    return engine_of(_transformer_of(x)).summary()


def apply_cache_on_transformer(
    transformer: nn.Module,
    *,
    use_cache: str | None = "Fb",
    rel_l1_thresh: float | None = None,
    motion_threshold: float = 0.1,
    num_steps: int | None = None,
    codebook: str | Mapping[float, int] | Sequence[tuple[float, int]] | None = None,
    moreg: bool | str = False,
    moreg_divisor: float = 1.0,
    return_hidden_states_first: bool | None = None,
    enable_adacorrection: bool = False,
    adacorr_gamma: float = 1.0,
    adacorr_lambda: float = 1.0,
    adacorr_tolerance: float | None = None,
    adacorr_mode: str = "adaptive",
    per_sample: bool = False,
    scheduler: Any = None,
    scope: DecisionScope | None = None,
    check_ranks: bool = False,
) -> nn.Module:
    """Enable a cache on a transformer, with the arguments that xfuser's callers know.

    ``use_cache=None`` is AdaCorrection alone if it is enabled, and otherwise leaves the transformer
    as it is. ``return_hidden_states_first`` is checked against the family's blocks. The other
    arguments are those of `CacheConfig` and of `enable_cache`. Returns the same transformer.
    """
    family = find_family(transformer)
    first = family.block_lists[0].returns[0] == family.output_stream
    if return_hidden_states_first not in (None, first):
        raise ValueError(
            f"return_hidden_states_first must be None or {first} for {family.transformer_class}, "
            f"got {return_hidden_states_first!r}"
        )
    if use_cache is None and not enable_adacorrection:
        return transformer
    config = CacheConfig(
        use_cache=use_cache or "Auto",
        rel_l1_thresh=rel_l1_thresh,
        motion_threshold=motion_threshold,
        num_steps=num_steps,
        codebook=codebook,
        moreg=moreg,
        moreg_divisor=moreg_divisor,
        enable_adacorrection=enable_adacorrection,
        adacorr_gamma=adacorr_gamma,
        adacorr_lambda=adacorr_lambda,
        adacorr_tolerance=adacorr_tolerance,
        adacorr_mode=adacorr_mode,
        per_sample=per_sample,
    )
    return enable_cache(
        transformer, config, scheduler=scheduler, scope=scope, check_ranks=check_ranks
    )
