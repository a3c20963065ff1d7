"""Offset estimation: how far the forecast has probably drifted, and whether to refresh.

The drift of the latents since the last refresh, times the forecast's error per unit of drift that
the last refresh found, is the error to expect. Added up over the skipped steps it is compared with
a tolerance. ``..reference`` has the same on one page.
"""

import math

from torch import Tensor

from xfuser_adacorr.model_executor.cache.methods.base import Call, Decision, Rule
from xfuser_adacorr.model_executor.cache.signals import Read, Signal, ratio
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import CallRecord

from .budget import Budget

FORCED_WHERE_GUESSED = 2
"""Last calls that are computed where the number of calls left is only guessed: it may be off by
one."""


class ErrorRule(Rule):
    """Compute where ``w = clip(gamma * S, 0, 1)`` is 1.

    ``S = E / tolerance + lambda * spatial``; E adds up ``kappa * drift * step_gain * ||v|| /
    ||x||`` over the skipped steps, with ``drift = ||x - x0|| / ||x0||`` against the latents of the
    last refresh, ``kappa = (||v - forecast|| / ||v||) / drift`` as the last refresh found it, and
    ``spatial = |s - s0| / s0``, s the mean over tokens of the deviation over channels. Before an
    offset is known E / tolerance is ``max(drift, |t - t0|) / (0.5 sqrt(tolerance))``. A ``budget``
    sets the tolerance from step to step. A ``cap`` loosens it where more than that budget would be
    computed: in a short run all errors are large, and those of fewer steps are no smaller.
    """

    first_drift_limit = 0.5
    """In units of sqrt(tolerance): drift beyond which no reuse is trusted while no refresh has
    found an offset yet."""
    gap_growth = 1.5
    """How many times as long as the last gap between refreshes the next one may be: what was found
    in a short gap tells little of a much longer one."""
    first_gap = 1 / 3
    """Length of the first gap at the most, in those steps that are left: nothing was found yet."""
    last_share = 1 / 3
    """Of the tolerance, up to which the last step is spared: nothing mends what it misses."""

    def __init__(
        self,
        gamma: float,
        lambda_: float,
        tolerance: float,
        budget: Budget | None = None,
        cap: Budget | None = None,
    ) -> None:
        self.gamma, self.lambda_, self.tolerance, self.budget = gamma, lambda_, tolerance, budget
        self.cap = cap
        self.reference: Tensor | None = None
        """Latents of the last refresh as the model was given them, float32."""
        self.deviation: Tensor | None = None
        """Sum over their tokens of the standard deviation over channels."""
        self.channels = -1
        """Their axis: three axes are tokens ``[B, N, C]``, more are ``[B, C, ...]``."""
        self.refreshed: Step | None = None
        self.gap: int | None = None
        """Steps from the refresh before to the last one."""
        self.kappa: float | None = None
        self.speed = 0.0
        """``||v|| / ||x||`` at the last refresh."""
        self.error = 0.0
        """E so far."""
        self._found: list[Tensor] = []
        """What the last refresh found, to be read with the next decision."""
        self._found_at: tuple[CallRecord | None, float | None, int | None] = (None, None, None)
        """Its record, the drift there, and the index of the refresh before if it had a line."""

    def measure(self, call: Call) -> Signal:
        if self.reference is None:
            return Signal()
        x, x0 = call.latents.float() * call.scale, self.reference
        difference, deviation = (x - x0).square().sum(), x.std(self.channels, unbiased=False).sum()
        return Signal(
            outside=[difference, x0.square().sum(), deviation, self.deviation, *self._found]
        )

    def decide(self, call: Call, read: Read) -> Decision:
        step, last = call.step, self.refreshed
        if last is None:
            return Decision(True, "first")
        difference, norm, deviation, deviation0, *found = read.outside
        if found:
            self._learn(*found)
        drift = math.sqrt(ratio(difference, norm))
        spatial = ratio(abs(deviation - deviation0), deviation0)
        kappa, tolerance = self.kappa, self.tolerance
        if self.budget is not None:
            tolerance = self.budget.tolerance(step, last, kappa, self.speed)
            kappa = self.budget.prior_kappa(step, self.speed) if kappa is None else kappa
        elif self.cap is not None and kappa is not None:
            tolerance = max(tolerance, self.cap.tolerance(step, last, kappa, self.speed))
        if kappa is None:
            moved, expected, error = max(drift, abs(step.coordinate - last.coordinate)), None, 0.0
            share = moved / (self.first_drift_limit * math.sqrt(tolerance))
        else:
            expected = kappa * drift
            error = self.error + expected * step.step_gain * self.speed
            share = ratio(error, tolerance)
        score = share + self.lambda_ * spatial
        # a forecast that went wrong may agree with itself: no gap is much longer than the last one
        furthest = math.inf if kappa is not None else self.first_gap * step.remaining
        if step.index - last.index >= (self.gap_growth * self.gap if self.gap else furthest):
            score = max(score, 1.0)
        weight = min(max(self.gamma * score, 0.0), 1.0)
        why = "offset" if weight >= 1.0 else "reuse"
        # a refresh in the last step mends one step only: one earlier is worth more
        spared = step.exact and expected is not None and error <= self.last_share * tolerance
        final = step.remaining <= (1 if step.exact else FORCED_WHERE_GUESSED)
        if final and not spared and self.budget is None:
            why = "last"
        return Decision(why != "reuse", why, weight, drift, spatial, expected, error, tolerance)

    def after_call(self, call: Call, decision: Decision) -> None:
        if self.cap is not None:
            self.cap.paid(call, decision)
        if not decision.compute and decision.expected_error is not None:
            self.error = decision.expected_error

    def computed(
        self, call: Call, decision: Decision, missed: list[Tensor], record: CallRecord
    ) -> None:
        """Measure drift from these latents on; ``missed`` (`Forecast.missed`) is read later."""
        step, last, latents = call.step, self.refreshed, call.latents.detach()
        if last is not None and step.index > last.index:  # not a step taken twice
            self.gap = step.index - last.index
        self._found_at = (record, decision.temporal, None if last is None else last.index)
        self.reference = latents.float() * call.scale  # a tensor of its own
        self.channels = 1 if latents.ndim > 3 else -1
        self.deviation = self.reference.std(self.channels, unbiased=False).sum()
        self.refreshed, self.error = step, 0.0
        self.found(missed)

    def found(self, missed: list[Tensor]) -> None:
        self._found = [*missed, self.reference.square().sum()] if missed else []

    def _learn(self, error: float, velocity: float, latents: float) -> None:
        """Take in what the last refresh found."""
        record, drift, since = self._found_at
        self._found, self.speed = [], math.sqrt(ratio(velocity, latents))
        if math.isnan(error):
            return
        record.found_offset = offset = math.sqrt(ratio(error, velocity))
        if drift:
            self.kappa = offset / drift
            budget = self.budget or self.cap
            if budget is not None and since is not None:
                budget.found(self.refreshed, since, self.kappa, self.speed)

    def tensors(self) -> list[Tensor]:
        return [] if self.reference is None else [self.reference, self.deviation, *self._found]
