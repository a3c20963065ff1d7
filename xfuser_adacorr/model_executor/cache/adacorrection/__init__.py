"""AdaCorrection: when to refresh (`rule`, `budget`), and what mends the skipped steps."""

from typing import Any

from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.schedulers import (
    MULTISTEP,
    REPAIRED,
    is_known_as,
    repair_of,
    unwrapped,
)

from .blend import line_blend, parabola_blend
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
        blend = parabola_blend if is_known_as(scheduler, MULTISTEP) else line_blend
        return Resample(stepper, warn, blend)
    warn("")
    return NoRepair()
