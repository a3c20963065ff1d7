"""All that the benchmark takes from inside the package; what is public comes from its front."""

from typing import Any

from xfuser_adacorr.core import distributed
from xfuser_adacorr.core.refreshes import evenly_spaced
from xfuser_adacorr.core.schedule_search import Steps, even_starts, search_schedule
from xfuser_adacorr.model_executor.cache.calibration import (
    ADA_FILE,
    FAST_FILE,
    TEA_FILE,
    AdaCalibration,
    model_fingerprint,
    save_ada_calibration,
    save_fast_maps,
    save_tea_polynomial,
)
from xfuser_adacorr.model_executor.cache.codebook_fitting import RATES, AdaRecorder, step_shares
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import find_family
from xfuser_adacorr.model_executor.cache.fitting import FastRecorder, TeaRecorder
from xfuser_adacorr.model_executor.cache.samplers import describe_sampler, log_snrs, read_schedule
from xfuser_adacorr.model_executor.cache.stored_schedule import (
    SCHEDULE_FILE,
    StoredSchedule,
    save_schedule,
)
from xfuser_adacorr.models.stdit3 import VIDEO_FPS


def computed_calls(summary: Any) -> list[bool]:
    """Of each call (or step) of a run in its order, whether it was computed and not reused."""
    return [call.refreshed for call in summary.trace.calls]


__all__ = [
    "ADA_FILE",
    "FAST_FILE",
    "RATES",
    "SCHEDULE_FILE",
    "TEA_FILE",
    "VIDEO_FPS",
    "AdaCalibration",
    "AdaRecorder",
    "FastRecorder",
    "Steps",
    "StoredSchedule",
    "TeaRecorder",
    "computed_calls",
    "describe_sampler",
    "distributed",
    "even_starts",
    "evenly_spaced",
    "find_family",
    "log_snrs",
    "model_fingerprint",
    "read_schedule",
    "save_ada_calibration",
    "save_fast_maps",
    "save_schedule",
    "save_tea_polynomial",
    "search_schedule",
    "step_shares",
]
