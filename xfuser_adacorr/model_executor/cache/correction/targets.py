"""Steering the tolerance during a run: towards a compute fraction, or an expected fidelity."""

import math
from dataclasses import dataclass, field

from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.targets import (
    PsnrRelation,
    budget_tolerance,
    fidelity_tolerance,
    refreshes_left,
)
from xfuser_adacorr.model_executor.cache.clock import SchedulerClock, Step, TimestepClock
from xfuser_adacorr.model_executor.cache.context import CallRecord

FIRST_ORDER_GAIN = 3.0
"""How much larger the error of the last value is taken to be than that of a line, while a second
output is not known."""
MEMORY = 0.5
"""What earlier rates count at each further refresh, in the mean that is expected to go on."""
BASE_SHARE = 0.5
"""Weight from which a base method's request for a refresh is granted."""


@dataclass(slots=True)
class Pace:
    """How far one branch has come."""

    calls: int = 0
    """Of the whole run; 0 before the first call is over."""
    spent: float = 0.0
    """Compute so far, in full calls."""
    reuse_cost: float = 0.0
    """Of the last reused call."""
    refreshed_at: int = 0
    """Step index of the last refresh."""
    error: float = 0.0
    """Expected errors of the gaps before the last refresh, added up."""
    measured: float = 0.0
    """Measured rates added up over the gaps that lines were measured on, earlier ones fading."""
    expected: float = 0.0
    """The profile's, added up alike."""


class Target:
    """What is common: rates ahead are the profile's, scaled by what refreshes found so far."""

    holds_budget = False
    """It rules every call, the last one too."""

    def __init__(self, profile: Profile, clock: SchedulerClock | TimestepClock) -> None:
        self.profile = profile
        self._weights = None
        if clock.schedule is not None:
            places = zip(clock.schedule.coordinates, clock.schedule.followed, strict=True)
            self._weights = [profile(place) * followed for place, followed in places]

    def tolerance(self, pace: Pace, step: Step, kappa: float | None, velocity: float) -> float:
        """What the expected error at ``step`` is compared with; 0 to refresh.

        ``kappa`` is the one last measured, None while there is none; ``velocity`` is
        ``||v|| / ||x||``.
        """
        raise NotImplementedError

    def ruling(self, pace: Pace, step: Step, reserved: int) -> str | None:
        """A reason that settles the call whatever its weight, or None (`reason_for`)."""
        return None

    def grants(self, weight: float) -> bool:
        """Whether a base method may have the refresh that it asks for."""
        return weight >= BASE_SHARE

    def prior_kappa(self, step: Step, velocity: float) -> float:
        """kappa before any is measured, for a forecast by the last value."""
        return FIRST_ORDER_GAIN * (self.profile(step.coordinate) / velocity) ** 2

    def found(self, pace: Pace, step: Step, since: int, kappa: float, velocity: float) -> None:
        """A refresh at ``step`` found ``kappa`` of a line, after one at index ``since``."""
        covered = self._between(since + 1, step.index + 1, step)
        pace.measured = MEMORY * pace.measured + covered * self._ratio(step, kappa, velocity)
        pace.expected = MEMORY * pace.expected + covered

    def answered(self, pace: Pace, step: Step, record: CallRecord) -> None:
        """The call at ``step`` is over."""
        pace.calls = pace.calls or step.remaining
        pace.spent += record.compute_fraction
        if record.refreshed:
            pace.refreshed_at = step.index
        else:
            pace.reuse_cost = record.compute_fraction

    def _ratio(self, step: Step, kappa: float, velocity: float) -> float:
        """Measured rate over the profile's."""
        return math.sqrt(kappa) * velocity / self.profile(step.coordinate)

    def _ahead(self, pace: Pace, step: Step, kappa: float | None, velocity: float) -> float:
        """L: expected rates added up from the last refresh to the end of the run."""
        scale = 1.0
        if pace.expected > 0.0:
            scale = pace.measured / pace.expected
        elif kappa is not None:
            scale = self._ratio(step, kappa, velocity)
        return scale * self._between(pace.refreshed_at + 1, step.index + step.remaining, step)

    def _between(self, first: int, end: int, step: Step) -> float:
        """The profile's rates of steps ``first`` up to ``end``; of equal ones if not known."""
        if self._weights is not None:
            return sum(self._weights[first:end])
        return self.profile(step.coordinate) * step.followed * (end - first)


class ComputeTarget(Target):
    """Spends a share of the full compute over the run: exactly, to a whole refresh.

    Where several branches are called in a step, the first decides for all of them.
    """

    holds_budget = True

    def __init__(
        self, fraction: float, profile: Profile, clock: SchedulerClock | TimestepClock
    ) -> None:
        super().__init__(profile, clock)
        self.fraction = fraction
        self._settled: tuple[int, bool] | None = None
        """Step index and outcome of the last call."""

    def _left(self, pace: Pace, step: Step) -> int:
        return refreshes_left(
            self.fraction, pace.calls, pace.spent, step.remaining, pace.reuse_cost
        )

    def tolerance(self, pace: Pace, step: Step, kappa: float | None, velocity: float) -> float:
        left = max(self._left(pace, step), 1)
        return budget_tolerance(self._ahead(pace, step, kappa, velocity), left)

    def ruling(self, pace: Pace, step: Step, reserved: int) -> str | None:
        if self._settled is not None and self._settled[0] == step.index:
            return "branch" if self._settled[1] else "reuse"
        left = self._left(pace, step)
        if left >= step.remaining:
            return "budget"
        return "reuse" if left <= reserved else None

    def answered(self, pace: Pace, step: Step, record: CallRecord) -> None:
        super().answered(pace, step, record)
        if self._settled is None or self._settled[0] != step.index:
            self._settled = step.index, record.refreshed


class FidelityTarget(Target):
    """Keeps the expected errors of the run, added up, within what a PSNR allows."""

    def __init__(
        self, allowed: float, profile: Profile, clock: SchedulerClock | TimestepClock
    ) -> None:
        super().__init__(profile, clock)
        self.allowed = allowed

    def tolerance(self, pace: Pace, step: Step, kappa: float | None, velocity: float) -> float:
        ahead = self._ahead(pace, step, kappa, velocity)
        return fidelity_tolerance(ahead, self.allowed - pace.error)


@dataclass(frozen=True, slots=True)
class TargetCalibration:
    """What is known of a model from its development prompts; without it, equal rates."""

    profile: Profile = field(default_factory=Profile)
    """Rate s per unit that a step follows its output, over the forecast's axis."""
    relation: PsnrRelation | None = None
