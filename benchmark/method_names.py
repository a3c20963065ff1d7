"""Names of the cache methods on the command line, ours and other projects'."""

from benchmark.peers import PEERS
from xfuser_adacorr import METHODS

CORRECTED = "+AdaCorrection"
UNCACHED = "None"
METHOD_NAMES = (UNCACHED, *METHODS, *(m + CORRECTED for m in METHODS if m != "Auto"))
SCHEDULE = "Schedule"
SCHEDULES = (SCHEDULE, SCHEDULE + CORRECTED)
"""Methods that are told the computed steps; a run does not take them unless they are named."""
ACCEPTED_METHODS = (*METHOD_NAMES, *SCHEDULES, *PEERS)
SCHEDULE_OPTIONS = ("schedule", "stand_in", "schedule_interpolation", "calibration")
