"""AdaCorrection: measured offsets decide when to refresh and mend what was reused in between.

Offset estimation (OEM): the drift of a call's input since the last refresh, times the forecast
error per unit of drift that the last refresh found, is the error to expect. Correction (ACM): at
w = 1 the call is computed; below, the forecast stands in, and the next refresh blends cached and
fresh outputs for the skipped calls and has the difference compensated (`.compensation`, `.replay`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xfuser_adacorr.core.offset import (
    Drift,
    correction_weight,
    displacement_error,
    error_scale,
    offset_score,
)
from xfuser_adacorr.core.signals import l2_sums, ratio, root_ratio, token_std_sum
from xfuser_adacorr.core.targets import PsnrRelation
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord

from .compensation import Compensation, EulerCompensation
from .forecast import OutputForecast, Outputs
from .targets import Pace, Target

FIRST_DRIFT_LIMIT = 0.5
"""In units of sqrt(tolerance): drift beyond which no reuse is trusted while no refresh has found an
offset yet."""
GAP_GROWTH = 1.5
"""How many times as long as the last gap between refreshes the next one may be: what was found in a
short gap tells little of a much longer one."""
LAST_SHARE = 1 / 3
"""Of the tolerance, up to which the last call is spared: nothing mends what it misses."""
FORCED_WHERE_GUESSED = 2
"""Last calls that are computed where the number of calls left is only guessed: it may be off by
one."""


@dataclass(frozen=True, slots=True)
class Score:
    """Outcome of the offset estimation for one call."""

    weight: float
    drift: Drift
    expected_offset: float | None
    accumulated_error: float
    tolerance: float


@dataclass(slots=True)
class History(Outputs):
    """Refreshes of one branch, and what they found."""

    latents: Tensor | None = None
    spatial: Tensor | None = None
    """Sum over tokens of the channel deviation of ``latents`` (scalar)."""
    refreshed_at: int | None = None
    """Step index of the last refresh."""
    gap: int | None = None
    """Steps from the refresh before to the last one."""
    kappa: float | None = None
    velocity_to_latents: float = 0.0
    accumulated_error: float = 0.0
    unread_temporal: float | None = None
    unread_record: CallRecord | None = None
    found_by: int | None = None
    """First of several pipeline stages: the refreshed call of which the last one tells more."""
    unread_line: tuple[Step, int] | None = None
    """Where the last refresh found the offset of a line, and the step index of the one before."""
    pace: Pace = field(default_factory=Pace)


class AdaCorrection(OutputForecast):
    """The adaptive mode: forecast, refresh rule, and what the refreshes found.

    ``compensation`` pays what reused calls owe, as the sampler allows; a ``target`` steers the
    tolerance in place of the fixed one.
    """

    def __init__(
        self,
        *,
        gamma: float,
        lambda_: float,
        tolerance: float,
        compensation: Compensation | None = None,
        followed: Callable[[Tensor, int], Tensor] = lambda output, channels: output,
        summed: Callable[[Tensor], Tensor] = lambda sums: sums,
        target: Target | None = None,
        relation: PsnrRelation | None = None,
    ) -> None:
        super().__init__(compensation or EulerCompensation(), followed, summed)
        self.gamma = gamma
        self.lambda_ = lambda_
        self.tolerance = tolerance
        self.target = target
        self.relation = relation
        """From the expected errors of a run to its PSNR."""

    def new_state(self) -> History:
        return History(debt=self.compensation.new_debt())

    def drift_sums(self, history: History, latents: Tensor) -> list[Tensor]:
        """Scalars for `score`; empty before the first refresh."""
        if history.latents is None:
            return []
        return [*l2_sums(latents, history.latents), token_std_sum(latents), history.spatial]

    def learn(self, history: History, sums: list[float]) -> None:
        """Take in what the last refresh found (the values of `unread`)."""
        error, velocity, latents = sums
        history.velocity_to_latents = root_ratio(velocity, latents)
        if not math.isnan(error):
            found = root_ratio(error, velocity)
            history.unread_record.found_offset = found
            if history.unread_temporal is not None:
                history.kappa = error_scale(found, history.unread_temporal) or history.kappa
        if self.target is not None and history.unread_line is not None and history.kappa:
            step, since = history.unread_line
            velocity = history.velocity_to_latents
            self.target.found(history.pace, step, since, history.kappa, velocity)
        history.unread, history.unread_record, history.unread_line = [], None, None

    def score(self, history: History, sums: list[float], step: Step) -> Score:
        """Offset score and weight of answering the call at ``step`` from the cache."""
        drift, kappa = Drift.from_sums(*sums), history.kappa
        if kappa is None and self.target is not None:
            kappa = self.target.prior_kappa(step, history.velocity_to_latents)
        if kappa is None:
            error, expected, tolerance = 0.0, None, self.tolerance
            moved = max(drift.temporal, abs(step.coordinate - history.sigma0))
            relative = moved / (FIRST_DRIFT_LIMIT * math.sqrt(tolerance))
        else:
            expected = kappa * drift.temporal
            error = history.accumulated_error + displacement_error(
                kappa, drift.temporal, step.followed, history.velocity_to_latents
            )
            tolerance = self._tolerance(history, step)
            relative = ratio(error, tolerance)
        total = offset_score(relative, drift.spatial, self.lambda_)
        if history.gap and step.index - history.refreshed_at >= GAP_GROWTH * history.gap:
            total = max(total, 1.0)
        return Score(correction_weight(total, self.gamma), drift, expected, error, tolerance)

    def _tolerance(self, history: History, step: Step) -> float:
        if self.target is None:
            return self.tolerance
        velocity = history.velocity_to_latents
        return self.target.tolerance(history.pace, step, history.kappa, velocity)

    def forced_last(self, step: Step, score: Score | None) -> int:
        """How many of the last calls are computed, whatever their weight.

        A refresh in the last call mends one step only, and the gap before it is never compensated:
        where little is expected to be missed, or a budget is held, one earlier is worth more.
        """
        if not step.exact:
            return FORCED_WHERE_GUESSED
        if self.target is not None and self.target.holds_budget:
            return 0
        known = score is not None and score.expected_offset is not None
        return int(not known or score.accumulated_error > LAST_SHARE * score.tolerance)

    def forced(self, step: Step) -> str | None:
        """Reason (`CallRecord.reason`) to compute a call for more than its own sake."""
        return "branch" if self.compensation.needs_refresh(step) else None

    def ruling(self, history: History, step: Step, reserved: int) -> str | None:
        """A reason that settles the call, whatever its weight; ``reserved``: last calls forced."""
        if self.target is None:
            return None
        return self.target.ruling(history.pace, step, reserved)

    def grants(self, score: Score | None) -> bool:
        """Whether a base method may have the refresh that it asks for."""
        return self.target is None or score is None or self.target.grants(score.weight)

    def reuse(
        self,
        history: History,
        given: Tensor,
        step: Step,
        score: Score | None,
        dtype: torch.dtype,
    ) -> Tensor:
        history.accumulated_error = score.accumulated_error
        return super().reuse(history, given, step, score, dtype)

    def answered(self, history: History, step: Step, record: CallRecord) -> None:
        if self.target is not None:
            self.target.answered(history.pace, step, record)

    def expected_psnr_db(self, histories: Iterable[History]) -> float | None:
        if self.relation is None:
            return None
        errors = [history.pace.error + history.accumulated_error for history in histories]
        return self.relation.psnr_db(max(errors))

    def refresh(
        self,
        history: History,
        latents: Tensor,
        given: Tensor,
        output: Tensor,
        step: Step,
        score: Score | None,
        record: CallRecord,
    ) -> Tensor:
        result, found = self.take_output(history, given, output, step, latents.shape[-1])
        self.take_latents(history, latents, score, record)
        history.unread = [*found, history.latents.square().sum()]
        return result

    def take_output(
        self, history: History, given: Tensor, output: Tensor, step: Step, channels: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Store a computed output; ``channels`` are those of the latents.

        Returns the output, compensated for skipped calls, and the squared norms of the error that
        the forecast would have had (NaN without one to compare) and of what it is relative to.
        """
        history.channels = channels
        fresh = self._velocity(output, given, channels, step)
        error = torch.full((), math.nan, device=fresh.device)
        moved = history.v0 is not None and history.sigma0 != step.coordinate
        if moved or history.v1 is not None:
            missed = fresh - self._line(history, self._weights(history, step))
            error = self.followed(missed, channels).square().sum()
        if history.v1 is not None:
            history.unread_line = step, history.pace.refreshed_at
        result = self._store(history, output, fresh, step)
        return result, [error, self.followed(fresh, channels).square().sum()]

    def take_latents(
        self, history: History, latents: Tensor, score: Score | None, record: CallRecord
    ) -> None:
        """Measure drift, and the next gap, from these latents on."""
        if history.refreshed_at is not None:
            history.gap = record.step_index - history.refreshed_at
        history.refreshed_at = record.step_index
        history.latents = latents.detach().to(torch.float32, copy=True)
        history.spatial = token_std_sum(history.latents)
        history.unread_temporal = None if score is None else score.drift.temporal
        history.unread_record = record
        history.pace.error += history.accumulated_error
        history.accumulated_error = 0.0
