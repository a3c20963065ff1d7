"""All that the benchmark takes from inside the package; what is public comes from its front."""

from typing import Any

from xfuser_adacorr.model_executor.cache import ranks
from xfuser_adacorr.model_executor.cache.adacorrection.euler import NoRepair
from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule
from xfuser_adacorr.model_executor.cache.calibration.files import model_fingerprint
from xfuser_adacorr.model_executor.cache.calibration.plan_file import (
    PLAN_FILE,
    Course,
    Plan,
    PlanFile,
)
from xfuser_adacorr.model_executor.cache.calibration.search import (
    Steps,
    even_starts,
    search_schedule,
)
from xfuser_adacorr.model_executor.cache.calibration.stored_schedule import (
    SCHEDULE_FILE,
    StoredSchedule,
    save_schedule,
)
from xfuser_adacorr.model_executor.cache.forecasts import DampedLine, LastValue, Line
from xfuser_adacorr.model_executor.cache.methods.base import Warmup
from xfuser_adacorr.model_executor.cache.methods.options import (
    AUTO_TOLERANCE,
    error_rule,
    within_budget,
)
from xfuser_adacorr.model_executor.cache.refreshes import evenly_spaced
from xfuser_adacorr.model_executor.cache.schedulers import describe_sampler, read_places
from xfuser_adacorr.model_executor.cache.schedulers import log_snrs as log_snrs_at
from xfuser_adacorr.models.opensora.transformer import VIDEO_FPS


def log_snrs(scheduler: Any) -> list[float]:
    """Logarithm of the signal-to-noise ratio at every step that ``set_timesteps`` made."""
    return log_snrs_at(read_places(scheduler))


def computed_calls(summary: Any) -> list[bool]:
    """Of each call (or step) of a run in its order, whether it was computed and not reused."""
    return [call.refreshed for call in summary.trace.calls]
