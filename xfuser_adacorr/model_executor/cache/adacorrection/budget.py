"""A compute budget in place of a tolerance, spent exactly.

The expected error of a skipped step grows with the drift since the last refresh, so over a gap of g
equal steps it adds up to ``(s g)^2 / 2`` with a rate s a step. For a given number of refreshes the
sum over all gaps is smallest where every gap adds up to the same error, the tolerance ``tau``;
``L = sum s`` over the steps to come then takes ``L / sqrt(2 tau)`` refreshes.
"""

import math
from collections.abc import Sequence

import numpy as np

from xfuser_adacorr.model_executor.cache.methods.base import Call, Decision, Read, Rule, Signal
from xfuser_adacorr.model_executor.cache.step import Step

FIRST_ORDER_GAIN = 3.0
"""How much larger the error of the last value is taken to be than that of a line, while a second
output is not known."""
MEMORY = 0.5
"""What earlier rates count at each further refresh, in the mean that is expected to go on."""
BASE_SHARE = 0.5
"""Weight from which a base method's request for a refresh is granted."""
FLOW_RATES = ((0.0, 1.0), (0.2, 0.8), (0.4, 0.8), (0.6, 1.0), (0.75, 1.4), (0.9, 1.8))
NOISE_RATES = (
    (0.0, 1.0),
    (0.15, 0.75),
    (0.3, 0.9),
    (0.5, 1.25),
    (0.65, 1.9),
    (0.75, 3.2),
    (0.9, 5.7),
)
"""(`Step.coordinate`, s per unit of step gain), linear in between: how unevenly outputs change over
the noise levels, under flow matching and under variance-preserving schedules. Means over
development prompts of two small models each (FLUX, Open-Sora; PixArt, DiT). Only ratios count."""
LAST_GAP = 1 / 3
"""Length of the gap after the last refresh, whose error nothing repairs, in those of other gaps."""


def refreshes_left(
    target: float, calls: int, spent: float, remaining: int, reuse_cost: float
) -> int:
    """Whole refreshes that bring the compute of a run nearest to ``target * calls``.

    ``spent`` is the compute so far in units of a full step, ``remaining`` the steps to come, each
    of at least ``reuse_cost``. Between 0 and ``remaining``.
    """
    if reuse_cost >= 1.0:
        return remaining
    affordable = (target * calls - spent - remaining * reuse_cost) / (1.0 - reuse_cost)
    return min(max(math.floor(affordable + 0.5), 0), remaining)


def budget_tolerance(ahead: float, refreshes: int) -> float:
    """tau that spends ``refreshes`` (at least 1) over the rates ``ahead``.

    ``(L / (B + LAST_GAP))^2 / 2``: B equal gaps and one, to the end, of `LAST_GAP` of their length.
    """
    return (ahead / (refreshes + LAST_GAP)) ** 2 / 2.0


def rate(step: Step) -> float:
    """s at a step's noise level, up to a factor."""
    places, rates = zip(*(FLOW_RATES if step.mass == 1.0 else NOISE_RATES), strict=True)
    return float(np.interp(step.coordinate, places, rates))


class Budget:
    """What is spent of a run's compute, and the tolerance that spends the rest.

    ``fraction`` in (0, 1]; ``steps`` are the run's, None where they are not known beforehand.
    """

    def __init__(self, fraction: float, steps: Sequence[Step] | None) -> None:
        self.fraction = fraction
        self._rates = None
        if steps is not None:
            self._rates = [rate(step) * step.step_gain for step in steps if not step.follows]
        self.steps = 0
        """Of the run, from its first step on; 0 before it is decided."""
        self.spent = 0.0
        """Compute so far, in full steps."""
        self.reuse_cost = 0.0
        """Of the last reused step."""
        self._measured = 0.0
        """Rates over the gaps that lines were measured on, earlier ones fading."""
        self._covered = 0.0

    def left(self, step: Step) -> int:
        """Refreshes that may still be spent, this step included."""
        steps = self.steps or step.remaining
        return refreshes_left(self.fraction, steps, self.spent, step.remaining, self.reuse_cost)

    def paid(self, call: Call, decision: Decision) -> None:
        """A step is over."""
        self.steps = self.steps or call.step.remaining
        self.spent += call.cost
        if not decision.compute:
            self.reuse_cost = call.cost

    def tolerance(self, step: Step, refreshed: Step, kappa: float | None, speed: float) -> float:
        scale = 1.0
        if self._covered > 0.0:
            scale = self._measured / self._covered
        elif kappa is not None:
            scale = math.sqrt(kappa) * speed / rate(refreshed)
        ahead = scale * self._between(refreshed.index + 1, step.index + step.remaining, step)
        return budget_tolerance(ahead, max(self.left(step), 1))

    def prior_kappa(self, step: Step, speed: float) -> float:
        """kappa before any is measured, for a forecast by the last value."""
        return FIRST_ORDER_GAIN * (rate(step) / speed) ** 2 if speed > 0.0 else FIRST_ORDER_GAIN

    def found(self, step: Step, since: int, kappa: float, speed: float) -> None:
        """A refresh at ``step`` found ``kappa`` of a line, after one at index ``since``."""
        covered = self._between(since + 1, step.index + 1, step)
        ratio = math.sqrt(kappa) * speed / rate(step)
        self._measured = MEMORY * self._measured + covered * ratio
        self._covered = MEMORY * self._covered + covered

    def _between(self, first: int, end: int, step: Step) -> float:
        if self._rates is None:
            return rate(step) * step.step_gain * (end - first)
        return sum(self._rates[first:end])


class Budgeted(Rule):
    """Overrides ``rule`` where the ``budget`` is just enough for all steps left, or used up.

    A request of a base method is granted from a weight of `BASE_SHARE` on.
    """

    def __init__(self, rule: Rule, budget: Budget) -> None:
        self.rule, self.budget = rule, budget

    def measure(self, call: Call) -> Signal:
        return self.rule.measure(call)

    def decide(self, call: Call, read: Read) -> Decision:
        decision, step = self.rule.decide(call, read), call.step
        if decision.why == "first":
            return decision
        left = self.budget.left(step)
        if left >= step.remaining:
            return decision.turned(True, "budget")
        if left <= 0:
            return decision.turned(False, "reuse")
        granted = decision.weight is None or decision.weight >= BASE_SHARE
        if decision.why == "base" and not granted:
            return decision.turned(False, "reuse")
        return decision

    def after_call(self, call: Call, decision: Decision) -> None:
        self.rule.after_call(call, decision)
        self.budget.paid(call, decision)

    def computed(self, call, decision, missed, record) -> None:
        self.rule.computed(call, decision, missed, record)

    def found(self, missed: list) -> None:
        self.rule.found(missed)

    def tensors(self) -> list:
        return self.rule.tensors()
