"""Corrections: what turns measured offsets into better values."""

import logging
from functools import cache
from typing import Any

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily

from .adacorrection import AdaCorrection
from .literal import LiteralCorrection

logger = logging.getLogger(__name__)

EULER_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


def steps_by_euler(scheduler: Any) -> bool:
    """Whether the sampler steps ``x <- x + dsigma * output``, so that a debt can be paid later."""
    is_euler = type(scheduler).__name__ in EULER_SCHEDULERS
    return is_euler and not getattr(scheduler.config, "stochastic_sampling", False)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def make_correction(
    config: CacheConfig, family: ModelFamily, scheduler: Any
) -> AdaCorrection | LiteralCorrection | None:
    """The correction that ``config`` asks for; ``scheduler`` is None if unknown (then Euler)."""
    if not config.enable_adacorrection:
        return None
    weights = {"gamma": config.adacorr_gamma, "lambda_": config.adacorr_lambda}
    if config.adacorr_mode == "literal":
        return LiteralCorrection(**weights, stream=family.output_stream)
    compensate = scheduler is None or steps_by_euler(scheduler)
    if not compensate:
        _warn_once(
            f"{type(scheduler).__name__}: AdaCorrection forecasts without compensation; "
            f"it compensates for {', '.join(EULER_SCHEDULERS)}"
        )
    own_rule = config.use_cache == "Auto"
    default = family.tolerance if own_rule else family.safety_tolerance
    tolerance = config.adacorr_tolerance or default
    return AdaCorrection(
        **weights, tolerance=tolerance, compensate=compensate, followed=family.followed
    )
