"""AdaCorrection: when to refresh (`rule`, `budget`), and what mends the skipped steps."""

from typing import Any

from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.schedulers import REPAIRED, repair_of, unwrapped

from .euler import EulerRepair, NoRepair
from .resample import Resample

Repair = EulerRepair | Resample | NoRepair


def make_repair(stepper: Any) -> Repair:
    """What suits the sampler that ``stepper`` is, or wraps; said once where it is nothing."""
    scheduler = unwrapped(stepper)
    name, kind = type(scheduler).__name__, repair_of(scheduler)

    def warn(circumstance: str) -> None:
        warn_once(
            f"{name}{circumstance}: AdaCorrection extrapolates without repair; it repairs "
            f"{', '.join(REPAIRED)} without added noise"
        )

    if kind == "euler":
        return EulerRepair()
    if kind == "resample":
        return Resample(stepper, warn)
    warn("")
    return NoRepair()
