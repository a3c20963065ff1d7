"""The variants of the ablation study, and the parts that pairs of them differ in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from benchmark.models.package import (
    AUTO_TOLERANCE,
    DampedLine,
    ErrorRule,
    LastValue,
    Line,
    NoRepair,
    Warmup,
    error_rule,
    within_budget,
)
from xfuser_adacorr import AdaCorrection, Auto, CacheConfig, Method, Schedule


def undamped(scope: Any) -> Line:
    """The line counts in full, whatever refreshes find."""
    return Line()


def last_value(scope: Any) -> LastValue:
    """The forecast is the last value."""
    return LastValue()


def damped(scope: Any) -> DampedLine:
    """The forecast as it is."""
    return DampedLine(scope.summed)


class AlwaysLast(ErrorRule):
    """The last step is computed, whatever is expected of it."""

    last_share = -1.0


class AnyGap(ErrorRule):
    """A gap may be as long as the expected error allows, whatever the one before it."""

    gap_growth = math.inf


def _plain(kind: type[Method], method: Method) -> dict[str, Any]:
    """The options that ``method`` shares with ``kind``."""
    return kind(**{f.name: getattr(method, f.name) for f in fields(kind)}).to_dict()


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsOfAuto(Auto):
    """Auto with some of its parts exchanged."""

    use_plan: bool = False
    forecast: Callable[[Any], Any] = damped
    repairs: bool = True
    rule: type[ErrorRule] = ErrorRule

    def make_rule(self, places: Any, inside: Any) -> Any:
        plain = error_rule(self, AUTO_TOLERANCE, places)
        own = self.rule(plain.gamma, plain.lambda_, plain.tolerance, plain.budget, plain.cap)
        rule = within_budget(own, own)
        return Warmup(rule, self.warmup) if self.warmup else rule

    def make_forecast(self, scope: Any) -> Any:
        return self.forecast(scope)

    def make_repair(self, stepper: Any) -> Any:
        return Auto.make_repair(self, stepper) if self.repairs else NoRepair()

    def to_dict(self) -> dict[str, Any]:
        parts = {"repairs": self.repairs, "rule": self.rule.__name__}
        return {**_plain(Auto, self), "forecast": self.forecast.__name__, **parts}


@dataclass(frozen=True, kw_only=True, slots=True)
class UndampedSchedule(Schedule):
    """Even steps with a line that is not damped."""

    def make_forecast(self, scope: Any) -> Line:
        return undamped(scope)

    def to_dict(self) -> dict[str, Any]:
        return {**_plain(Schedule, self), "forecast": undamped.__name__}


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A configuration over a knob that sets its compute."""

    name: str
    config: Method
    """Without the knob."""
    knob: str = "adacorr_tolerance"
    """``schedule`` (evenly spaced refreshes), ``target_compute`` or ``adacorr_tolerance``."""

    def at(self, value: float) -> Method:
        """The configuration at a value of the knob."""
        field = {"schedule": "every", "adacorr_tolerance": "tolerance"}.get(self.knob, self.knob)
        if isinstance(value, tuple):
            return replace(self.config, every=None, steps=value)
        return replace(self.config, **{field: value})


_even = partial(CacheConfig.from_name, "Schedule", schedule=1)
_corrected = partial(CacheConfig.from_name, "Schedule+AdaCorrection", schedule=1)
_auto = partial(CacheConfig.from_name, "Auto", use_plan=False)

REUSE = Variant(name="even, reuse", config=_even(), knob="schedule")
FORECAST = Variant(name="even, forecast", config=_even(stand_in="forecast"), knob="schedule")
EVEN = Variant(name="even, AdaCorrection", config=_corrected(), knob="schedule")
EVEN_UNDAMPED = Variant(
    name="even, AdaCorrection, undamped line",
    config=UndampedSchedule(every=1, correction=AdaCorrection()),
    knob="schedule",
)
AUTO = Variant(name="Auto", config=_auto())
UNCOMPENSATED = Variant(name="Auto, no compensation", config=PartsOfAuto(repairs=False))
LAST_VALUE = Variant(name="Auto, last value", config=PartsOfAuto(forecast=last_value))
UNDAMPED = Variant(name="Auto, undamped line", config=PartsOfAuto(forecast=undamped))
LAMBDA_0 = Variant(name="Auto, lambda 0", config=_auto(adacorr_lambda=0.0))
LAMBDA_4 = Variant(name="Auto, lambda 4", config=_auto(adacorr_lambda=4.0))
GAMMA_HALF = Variant(name="Auto, gamma 0.5", config=_auto(adacorr_gamma=0.5))
GAMMA_2 = Variant(name="Auto, gamma 2", config=_auto(adacorr_gamma=2.0))
LAST = Variant(name="Auto, last call refreshed", config=PartsOfAuto(rule=AlwaysLast))
ANY_GAP = Variant(name="Auto, gaps of any length", config=PartsOfAuto(rule=AnyGap))
TARGET = Variant(name="Auto, compute target", config=_auto(use_plan=False), knob="target_compute")

VARIANTS = (
    REUSE,
    FORECAST,
    EVEN,
    EVEN_UNDAMPED,
    AUTO,
    UNCOMPENSATED,
    LAST_VALUE,
    UNDAMPED,
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
    Part("damping of the line (even steps)", EVEN, EVEN_UNDAMPED),
    Part("refresh rule for even steps", AUTO, EVEN),
    Part("line for the last value (Auto)", AUTO, LAST_VALUE),
    Part("damping of the line (Auto)", AUTO, UNDAMPED),
    Part("compensation (Auto)", AUTO, UNCOMPENSATED),
    Part("spatial term: lambda 1 for 0", AUTO, LAMBDA_0),
    Part("spatial term: lambda 4 for 0", LAMBDA_4, LAMBDA_0),
    Part("gamma 0.5 for 1", GAMMA_HALF, AUTO),
    Part("gamma 2 for 1", GAMMA_2, AUTO),
    Part("last call spared where little is expected", AUTO, LAST),
    Part("gaps limited by the last one", AUTO, ANY_GAP),
    Part("compute target for a fixed tolerance", TARGET, AUTO),
)
