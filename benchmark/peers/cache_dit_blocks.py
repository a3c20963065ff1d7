"""The caches of cache-dit, enabled on the pipeline by its own ``enable_cache``."""

import os
from collections.abc import Callable
from typing import Any

from benchmark.peers import Run

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it says every step on standard output

import cache_dit


def _enable(
    pipe: Any, options: dict[str, Any], run: Run, calibrator: Any = None
) -> Callable[[], None]:
    config = cache_dit.DBCacheConfig(
        num_inference_steps=run.num_inference_steps, enable_separate_cfg=run.true_cfg, **options
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    return lambda: cache_dit.disable_cache(pipe)


def _calibrated(make: Callable[[], Any]) -> Callable[..., Callable[[], None]]:
    return lambda pipe, options, run: _enable(pipe, options, run, make())


def _steps_mask(pipe: Any, options: dict[str, Any], run: Run) -> Callable[[], None]:
    policy = options.pop("mask_policy")
    mask = cache_dit.steps_mask(total_steps=run.num_inference_steps, mask_policy=policy)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    return _enable(pipe, {**options, "steps_computation_mask": mask}, run, calibrator)


def _taylorseer(order: int) -> Callable[[], Any]:
    return lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)


ENABLE = {
    "DBCache": _enable,
    "DBCache+TaylorSeer": _calibrated(_taylorseer(1)),
    "DBCache+TaylorSeer2": _calibrated(_taylorseer(2)),
    "DBCache+FoCa": _calibrated(lambda: cache_dit.FoCaCalibratorConfig()),
    "DBCache+DMD": _calibrated(lambda: cache_dit.DMDCalibratorConfig()),
    "StepsMask+TaylorSeer": _steps_mask,
}
"""By method: (pipeline, options, run) -> what ends it."""
