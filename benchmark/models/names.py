"""Names of the cache methods, ours and other projects', and what can be done to a method."""

from collections.abc import Sequence
from typing import Any

from benchmark.peers import PEERS, is_peer
from xfuser_adacorr import METHODS, CacheConfig

CORRECTED = "+AdaCorrection"
UNCACHED = "None"
SCHEDULE = "Schedule"
SCHEDULES = (SCHEDULE, SCHEDULE + CORRECTED)
"""Methods that are told the computed steps; a run does not take them unless they are named."""
LEARNED, LEARNING = "Learned", "Auto, learn=1"
"""Learned plans: made beforehand, and out of the first generation."""
OURS = (*METHODS, *(name + CORRECTED for name in METHODS if name != "Auto"))
METHOD_NAMES = (UNCACHED, *OURS)
ACCEPTED_METHODS = (*METHOD_NAMES, *SCHEDULES, LEARNED, LEARNING, *PEERS)
TARGETS = ("target_compute", "target_speedup")
"""Options that state the compute of a run, in place of ``adacorr_tolerance``."""
SCHEDULE_OPTIONS = ("schedule", "stand_in", "schedule_interpolation", "calibration")


def changed(config: CacheConfig, **options: Any) -> CacheConfig:
    """The method with other options."""
    return CacheConfig.from_dict({**config.to_dict(), **options})


def expanded(methods: Sequence[str], corrected: bool) -> tuple[str, ...]:
    """Without repetitions; with each base method's corrected variant right after it."""
    listed = []
    for method in methods:
        method = "Auto" if method == "Auto" + CORRECTED else method
        listed.append(method)
        alone = method in (UNCACHED, "Auto", LEARNED, LEARNING) or is_peer(method)
        if corrected and not alone and not method.endswith(CORRECTED):
            listed.append(method + CORRECTED)
    return tuple(dict.fromkeys(listed))
