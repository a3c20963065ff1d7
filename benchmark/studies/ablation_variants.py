"""The variants of the ablation study, and the parts that pairs of them differ in."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

from xfuser_adacorr import CacheConfig
from xfuser_adacorr.core import blend
from xfuser_adacorr.model_executor.cache import correction
from xfuser_adacorr.model_executor.cache.correction import adacorrection, forecast
from xfuser_adacorr.model_executor.cache.correction.compensation import Compensation

# Parts that no option switches off are replaced in the running program, for the study alone.


def without_compensation() -> AbstractContextManager:
    """What reused calls owe stays unpaid; forecast and refresh rule are as ever."""
    return patch.object(correction, "make_compensation", lambda clock, stage=None: Compensation())


def without_curvature() -> AbstractContextManager:
    """The blend of cached and fresh outputs is linear, never the parabola."""
    return patch.object(blend, "CURVATURE_MAX_GAP_RATIO", 0.0)


def without_line() -> AbstractContextManager:
    """The forecast is the last value."""
    return patch.object(forecast, "line_weights", lambda *places: (1.0, 0.0))


def without_damping() -> AbstractContextManager:
    """The line counts in full, whatever refreshes find."""
    return patch.object(forecast, "updated_damping", lambda *changes: 1.0)


def with_last_refreshed() -> AbstractContextManager:
    """The last call is computed, whatever is expected of it."""
    return patch.object(adacorrection, "LAST_SHARE", -1.0)


def with_any_gap() -> AbstractContextManager:
    """A gap may be as long as the expected error allows, whatever the one before it."""
    return patch.object(adacorrection, "GAP_GROWTH", math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A configuration over a knob that sets its compute."""

    name: str
    config: CacheConfig
    """Without the knob."""
    knob: str = "adacorr_tolerance"
    """``schedule`` (evenly spaced refreshes), ``target_compute`` or ``adacorr_tolerance``."""
    switch: Callable[[], AbstractContextManager] = nullcontext
    """Entered while the pictures are made."""


_even = partial(CacheConfig.from_name, "Schedule", schedule=1)
_corrected = partial(CacheConfig.from_name, "Schedule+AdaCorrection", schedule=1)
_auto = partial(CacheConfig.from_name, "Auto")

REUSE = Variant(name="even, reuse", config=_even(), knob="schedule")
FORECAST = Variant(name="even, forecast", config=_even(stand_in="forecast"), knob="schedule")
EVEN = Variant(name="even, AdaCorrection", config=_corrected(), knob="schedule")
EVEN_LINEAR = Variant(
    name="even, AdaCorrection, linear blend",
    config=_corrected(),
    knob="schedule",
    switch=without_curvature,
)
EVEN_UNDAMPED = Variant(
    name="even, AdaCorrection, undamped line",
    config=_corrected(),
    knob="schedule",
    switch=without_damping,
)
AUTO = Variant(name="Auto", config=_auto())
UNCOMPENSATED = Variant(name="Auto, no compensation", config=_auto(), switch=without_compensation)
LAST_VALUE = Variant(name="Auto, last value", config=_auto(), switch=without_line)
UNDAMPED = Variant(name="Auto, undamped line", config=_auto(), switch=without_damping)
LINEAR = Variant(name="Auto, linear blend", config=_auto(), switch=without_curvature)
LAMBDA_0 = Variant(name="Auto, lambda 0", config=_auto(adacorr_lambda=0.0))
LAMBDA_4 = Variant(name="Auto, lambda 4", config=_auto(adacorr_lambda=4.0))
GAMMA_HALF = Variant(name="Auto, gamma 0.5", config=_auto(adacorr_gamma=0.5))
GAMMA_2 = Variant(name="Auto, gamma 2", config=_auto(adacorr_gamma=2.0))
LAST = Variant(name="Auto, last call refreshed", config=_auto(), switch=with_last_refreshed)
ANY_GAP = Variant(name="Auto, gaps of any length", config=_auto(), switch=with_any_gap)
TARGET = Variant(name="Auto, compute target", config=_auto(), knob="target_compute")

VARIANTS = (
    REUSE,
    FORECAST,
    EVEN,
    EVEN_LINEAR,
    EVEN_UNDAMPED,
    AUTO,
    UNCOMPENSATED,
    LAST_VALUE,
    UNDAMPED,
    LINEAR,
    LAMBDA_0,
    LAMBDA_4,
    GAMMA_HALF,
    GAMMA_2,
    LAST,
    ANY_GAP,
    TARGET,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that ``present`` has and ``absent`` lacks."""

    name: str
    present: Variant
    absent: Variant


PARTS = (
    Part("line for the last value (even steps)", FORECAST, REUSE),
    Part("compensation (even steps)", EVEN, FORECAST),
    Part("curvature of the blend (even steps)", EVEN, EVEN_LINEAR),
    Part("damping of the line (even steps)", EVEN, EVEN_UNDAMPED),
    Part("refresh rule for even steps", AUTO, EVEN),
    Part("line for the last value (Auto)", AUTO, LAST_VALUE),
    Part("damping of the line (Auto)", AUTO, UNDAMPED),
    Part("compensation (Auto)", AUTO, UNCOMPENSATED),
    Part("curvature of the blend (Auto)", AUTO, LINEAR),
    Part("spatial term: lambda 1 for 0", AUTO, LAMBDA_0),
    Part("spatial term: lambda 4 for 0", LAMBDA_4, LAMBDA_0),
    Part("gamma 0.5 for 1", GAMMA_HALF, AUTO),
    Part("gamma 2 for 1", GAMMA_2, AUTO),
    Part("last call spared where little is expected", AUTO, LAST),
    Part("gaps limited by the last one", AUTO, ANY_GAP),
    Part("compute target for a fixed tolerance", TARGET, AUTO),
)
