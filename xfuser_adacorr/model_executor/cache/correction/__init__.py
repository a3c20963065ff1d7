"""Corrections: what turns measured offsets into better values."""

import logging
from functools import cache, partial
from typing import TYPE_CHECKING

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.model_executor.cache.clock import SchedulerClock, TimestepClock
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily
from xfuser_adacorr.model_executor.cache.samplers import COMPENSATED, check_sampler, mending_of

from .adacorrection import AdaCorrection
from .compensation import Compensation, EulerCompensation
from .forecast import OutputForecast
from .literal import LiteralCorrection
from .replay import ReplayCompensation
from .sample_replays import SampleReplays
from .staged import StagedCorrection
from .targets import ComputeTarget, FidelityTarget, Target, TargetCalibration

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.pipefusion import PipelineStage

logger = logging.getLogger(__name__)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_uncompensated(scheduler_name: str, circumstance: str) -> None:
    _warn_once(
        f"{scheduler_name}{circumstance}: AdaCorrection forecasts without compensation; it "
        f"compensates for {', '.join(COMPENSATED)} without added noise"
    )


def make_compensation(
    clock: SchedulerClock | TimestepClock, stage: "PipelineStage | None" = None
) -> Compensation:
    """What suits the clock's scheduler; Euler steps are assumed where it is not known.

    Of pipeline stages the last one compensates, since it steps the scheduler.

    Raises `ValueError` for a scheduler that AdaCorrection cannot correct under.
    """
    scheduler = clock.scheduler
    if scheduler is None:
        return EulerCompensation()
    check_sampler(scheduler)
    if stage is not None and not stage.is_last:
        return Compensation()
    name, mending = type(scheduler).__name__, mending_of(scheduler)
    if mending == "output":
        return EulerCompensation()
    if mending == "replay":
        return ReplayCompensation(
            clock.stepper,
            clock.schedule.timesteps,
            partial(_warn_uncompensated, name),
            in_patches=lambda: stage is not None and bool(stage.patch),
        )
    _warn_uncompensated(name, "")
    return Compensation()


def make_sample_compensations(
    clock: SchedulerClock | TimestepClock, samples: int
) -> list[Compensation]:
    """`make_compensation` for each sample of a batch, where they are decided one by one."""
    scheduler = clock.scheduler
    if scheduler is None or mending_of(scheduler) != "replay":
        return [make_compensation(clock) for _ in range(samples)]
    check_sampler(scheduler)
    warn = partial(_warn_uncompensated, type(scheduler).__name__)
    return SampleReplays(clock.stepper, clock.schedule.timesteps, warn, samples).replays


def make_correction(
    config: CacheConfig,
    family: ModelFamily,
    clock: SchedulerClock | TimestepClock,
    *,
    scope: DecisionScope,
    compensation: Compensation | None = None,
    measures: bool = True,
    calibration: TargetCalibration | None = None,
    stage: "PipelineStage | None" = None,
    latent_channels: int | None = None,
) -> OutputForecast | LiteralCorrection | None:
    """The correction that ``config`` asks for, for one generation on the clock's schedule.

    ``scope`` are the ranks that share the sample; without a ``compensation`` it is what suits the
    clock's scheduler. Unless it ``measures``, the calls to compute are given, and only their values
    are corrected. ``calibration`` is for targets, None without one; ``latent_channels`` has to be
    given with a pipeline's ``stage``.
    """
    if not config.enable_adacorrection:
        if not config.forecasts_output:
            return None
        return OutputForecast(Compensation(), family.followed, scope.summed)
    weights = {"gamma": config.adacorr_gamma, "lambda_": config.adacorr_lambda}
    if config.adacorr_mode == "literal":
        return LiteralCorrection(**weights, stream=family.output_stream)
    compensation = compensation or make_compensation(clock, stage)
    if not measures:
        return OutputForecast(compensation, family.followed, scope.summed)
    own_rule = config.use_cache == "Auto"
    default = family.tolerance if own_rule else family.safety_tolerance
    options = {
        **weights,
        "tolerance": config.adacorr_tolerance or default,
        "compensation": compensation,
        "followed": family.followed,
        "summed": scope.summed,
    }
    if stage is not None:
        return StagedCorrection(stage, latent_channels, **options)
    return AdaCorrection(
        **options,
        target=None if calibration is None else make_target(config, calibration, clock),
        relation=None if calibration is None else calibration.relation,
    )


def make_target(
    config: CacheConfig, calibration: TargetCalibration, clock: SchedulerClock | TimestepClock
) -> Target:
    """The target that ``config`` sets, for one generation."""
    if config.compute_target is not None:
        return ComputeTarget(config.compute_target, calibration.profile, clock)
    allowed = calibration.relation.error(config.target_psnr)
    return FidelityTarget(allowed, calibration.profile, clock)
