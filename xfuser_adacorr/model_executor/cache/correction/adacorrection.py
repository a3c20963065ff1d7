"""AdaCorrection: measured offsets decide when to refresh and mend what was reused in between.

Offset estimation (OEM): the drift of a call's input since the last refresh, times the forecast
error per unit of drift that the last refresh found, is the error to expect. Correction (ACM): at
w = 1 the call is computed; below, the forecast stands in, and the next refresh blends cached and
fresh outputs for the skipped calls and has the difference compensated (`.compensation`, `.replay`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.core.forecast import line_weights
from xfuser_adacorr.core.offset import (
    Drift,
    correction_weight,
    displacement_error,
    error_scale,
    offset_score,
)
from xfuser_adacorr.core.signals import l2_sums, root_ratio, token_std_sum
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord

from .compensation import Compensation, EulerCompensation

FIRST_DRIFT_LIMIT = 0.5
"""In units of sqrt(tolerance): drift beyond which no reuse is trusted while no refresh has found an
offset yet."""


@dataclass(frozen=True, slots=True)
class Score:
    """Outcome of the offset estimation for one call."""

    weight: float
    drift: Drift
    expected_offset: float | None
    accumulated_error: float


@dataclass(slots=True)
class History:
    """Refreshes of one branch; tensors are float32 copies in the latents' shape."""

    latents: Tensor | None = None
    spatial: Tensor | None = None
    """Sum over tokens of the channel deviation of ``latents`` (scalar)."""
    v0: Tensor | None = None
    v1: Tensor | None = None
    sigma0: float = 0.0
    """`Step.coordinate` of ``v0``, which is sigma for flow matching."""
    sigma1: float | None = None
    kappa: float | None = None
    velocity_to_latents: float = 0.0
    accumulated_error: float = 0.0
    unread: list[Tensor] = field(default_factory=list)
    """What the last refresh found, to be read with the next decision."""
    unread_temporal: float | None = None
    unread_record: CallRecord | None = None
    found_by: int | None = None
    """First of several pipeline stages: the refreshed call of which the last one tells more."""
    debt: Any = None
    """The compensation's own state."""


class AdaCorrection:
    """The adaptive mode: forecast, refresh rule, and what the refreshes found.

    ``compensation`` pays what reused calls owe, as the sampler allows.
    """

    def __init__(
        self,
        *,
        gamma: float,
        lambda_: float,
        tolerance: float,
        compensation: Compensation | None = None,
        followed: Callable[[Tensor, int], Tensor] = lambda output, channels: output,
    ) -> None:
        self.gamma = gamma
        self.lambda_ = lambda_
        self.tolerance = tolerance
        self.compensation = compensation or EulerCompensation()
        self.followed = followed
        """(output, channels of the latents) -> the part of it that the sampler follows."""

    def new_state(self) -> History:
        return History(debt=self.compensation.new_debt())

    def drift_sums(self, history: History, latents: Tensor) -> list[Tensor]:
        """Scalars for `score`; empty before the first refresh."""
        if history.latents is None:
            return []
        return [*l2_sums(latents, history.latents), token_std_sum(latents), history.spatial]

    def unread(self, history: History) -> list[Tensor]:
        """What the last refresh found, to be read with this decision."""
        return history.unread

    def learn(self, history: History, sums: list[float]) -> None:
        """Take in what the last refresh found (the values of `unread`)."""
        error, velocity, latents = sums
        history.velocity_to_latents = root_ratio(velocity, latents)
        if not math.isnan(error):
            found = root_ratio(error, velocity)
            history.unread_record.found_offset = found
            if history.unread_temporal is not None:
                history.kappa = error_scale(found, history.unread_temporal) or history.kappa
        history.unread, history.unread_record = [], None

    def score(self, history: History, sums: list[float], step: Step) -> Score:
        """Offset score and weight of answering the call at ``step`` from the cache."""
        drift = Drift.from_sums(*sums)
        if history.kappa is None:
            error, expected = 0.0, None
            relative = drift.temporal / (FIRST_DRIFT_LIMIT * math.sqrt(self.tolerance))
        else:
            expected = history.kappa * drift.temporal
            error = history.accumulated_error + displacement_error(
                history.kappa, drift.temporal, step.followed, history.velocity_to_latents
            )
            relative = error / self.tolerance
        weight = correction_weight(offset_score(relative, drift.spatial, self.lambda_), self.gamma)
        return Score(weight, drift, expected, error)

    def forced(self, step: Step) -> str | None:
        """Reason (`CallRecord.reason`) to compute a call for more than its own sake."""
        return "branch" if self.compensation.needs_refresh(step) else None

    def reuse(self, history: History, step: Step, score: Score, dtype: torch.dtype) -> Tensor:
        """Return the forecast ``[B, N, C]`` for the call at ``step``."""
        history.accumulated_error = score.accumulated_error
        return self.forecast(history, step, dtype)

    def forecast(self, history: History, step: Step, dtype: torch.dtype) -> Tensor:
        """Return the line through the last two computed outputs at ``step``."""
        weights = line_weights(step.coordinate, history.sigma0, history.sigma1)
        self.compensation.reused(history, step, weights)
        return self._line(history, weights).to(dtype)

    def refresh(
        self,
        history: History,
        latents: Tensor,
        output: Tensor,
        step: Step,
        score: Score | None,
        record: CallRecord,
    ) -> Tensor:
        """Store a computed output ``[B, N, C]`` and return it, compensated for skipped calls."""
        result, found = self.take_output(history, output, step, latents.shape[-1])
        self.take_latents(history, latents, score, record)
        history.unread = [*found, history.latents.square().sum()]
        return result

    def take_output(
        self, history: History, output: Tensor, step: Step, channels: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Store a computed output; ``channels`` are those of the latents.

        Returns the output, compensated for skipped calls, and the squared norms of the error that
        the forecast would have had (NaN without one to compare) and of what it is relative to.
        """
        fresh = output.detach().to(torch.float32, copy=True)
        result = self.compensation.refreshed(history, output, fresh, step)
        error = torch.full((), math.nan, device=fresh.device)
        moved = history.v0 is not None and history.sigma0 != step.coordinate
        if moved or history.v1 is not None:
            weights = line_weights(step.coordinate, history.sigma0, history.sigma1)
            missed = self.followed(fresh - self._line(history, weights), channels)
            error = missed.square().sum()
        if moved:
            history.v1, history.sigma1 = history.v0, history.sigma0
        history.v0, history.sigma0 = fresh, step.coordinate
        return result, [error, self.followed(fresh, channels).square().sum()]

    def take_latents(
        self, history: History, latents: Tensor, score: Score | None, record: CallRecord
    ) -> None:
        """Measure drift from these latents on."""
        history.latents = latents.detach().to(torch.float32, copy=True)
        history.spatial = token_std_sum(history.latents)
        history.unread_temporal = None if score is None else score.drift.temporal
        history.unread_record = record
        history.accumulated_error = 0.0

    @staticmethod
    def _line(history: History, weights: tuple[float, float]) -> Tensor:
        a0, a1 = weights
        return history.v0 if history.v1 is None else a0 * history.v0 + a1 * history.v1
