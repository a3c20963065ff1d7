"""Offset estimation: how far the forecast has probably drifted, and whether to refresh.

The drift of the latents since the last refresh, times the forecast's error per unit of drift that
the last refresh found, is the error to expect. Added up over the skipped steps it is compared with
a tolerance. ``..reference`` has the same on one page.
"""

import math

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.methods.base import Call, Decision, Rule
from xfuser_adacorr.model_executor.cache.signals import (
    Read,
    Signal,
    drift_sums,
    latent_tokens,
    ratio,
    root_ratio,
    token_std_sum,
)
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
        """Latents of the last refresh, float32, as tokens; ``spatial``: their deviations' sum."""
        self.spatial: Tensor | None = None
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
        drift = drift_sums(call.latents, self.reference)
        return Signal(outside=[*drift, self.spatial, *self._found])

    def decide(self, call: Call, read: Read) -> Decision:
        step = call.step
        if self.reference is None:
            return Decision(True, "first")
        difference, reference, std, std0, *found = read.outside
        if found:
            self._learn(found)
        drift, spatial = root_ratio(difference, reference), ratio(abs(std - std0), std0)
        kappa, tolerance = self.kappa, self.tolerance
        if kappa is None and self.budget is not None:
            kappa = self.budget.prior_kappa(step, self.speed)
        if kappa is None:
            expected, error = None, 0.0
            moved = max(drift, abs(step.coordinate - self.refreshed.coordinate))
            share = moved / (self.first_drift_limit * math.sqrt(tolerance))
        else:
            expected = kappa * drift
            error = self.error + expected * step.step_gain * self.speed
            if self.budget is not None:
                tolerance = self.budget.tolerance(step, self.refreshed, self.kappa, self.speed)
            elif self.cap is not None:
                capped = self.cap.tolerance(step, self.refreshed, self.kappa, self.speed)
                tolerance = max(tolerance, capped)
            share = ratio(error, tolerance)
        score = share + self.lambda_ * spatial
        if step.index - self.refreshed.index >= self._furthest(step):
            score = max(score, 1.0)
        weight = min(max(self.gamma * score, 0.0), 1.0)
        why = "offset" if weight >= 1.0 else "reuse"
        if step.remaining <= self._forced_last(step, expected, error, tolerance):
            why = "last"
        measures = {
            "temporal": drift,
            "spatial": spatial,
            "expected_offset": expected,
            "expected_error": error,
            "tolerance": tolerance,
        }
        return Decision(why != "reuse", why, weight=weight, **measures)

    def _furthest(self, step: Step) -> float:
        """Length of a gap that is ended whatever is expected.

        A forecast that went wrong may agree with itself: on latents that hardly move, with outputs
        that stay. A budget spreads its refreshes by itself while no gap is known.
        """
        if self.gap:
            return self.gap_growth * self.gap
        known = self.kappa is not None or self.budget is not None
        return math.inf if known else self.first_gap * step.remaining

    def _forced_last(
        self, step: Step, expected: float | None, error: float, tolerance: float
    ) -> int:
        """How many of the last steps are computed, whatever their weight.

        A refresh in the last step mends one step only, and the gap before it is never repaired:
        where little is expected to be missed, or a budget is held, one earlier is worth more.
        """
        if self.budget is not None:
            return 0
        if not step.exact:
            return FORCED_WHERE_GUESSED
        return int(expected is None or error > self.last_share * tolerance)

    def after_call(self, call: Call, decision: Decision) -> None:
        if self.cap is not None:
            self.cap.paid(call, decision)
        if not decision.compute and decision.expected_error is not None:
            self.error = decision.expected_error

    def computed(
        self, call: Call, decision: Decision, missed: list[Tensor], record: CallRecord
    ) -> None:
        """Measure drift from these latents on; ``missed`` (`Forecast.missed`) is read later."""
        step, last = call.step, self.refreshed
        if last is not None and step.index > last.index:  # not a step taken twice
            self.gap = step.index - last.index
        self._found_at = (record, decision.temporal, None if last is None else last.index)
        self.reference = latent_tokens(call.latents.detach()).to(torch.float32, copy=True)
        self.spatial = token_std_sum(self.reference)
        self.refreshed, self.error = step, 0.0
        self.found(missed)

    def found(self, missed: list[Tensor]) -> None:
        self._found = [*missed, self.reference.square().sum()] if missed else []

    def _learn(self, found: list[float]) -> None:
        """Take in what the last refresh found."""
        error, velocity, latents = found
        record, drift, since = self._found_at
        self.speed = root_ratio(velocity, latents)
        if not math.isnan(error):
            offset = root_ratio(error, velocity)
            record.found_offset = offset
            if drift:
                self.kappa = offset / drift
                budget = self.budget or self.cap
                if budget is not None and since is not None:
                    budget.found(self.refreshed, since, self.kappa, self.speed)
        self._found = []

    def tensors(self) -> list[Tensor]:
        return [] if self.reference is None else [self.reference, self.spatial, *self._found]
