"""The main flow: decide, then compute, learn and repair, or extrapolate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .adacorrection import Repair
from .forecasts import Forecast, as_output, as_velocity
from .methods.base import Call, Decision, Rule
from .ranks import DecisionScope
from .step import Step
from .trace import CallRecord


@dataclass(slots=True)
class Lane:
    """What one sequence of outputs is cached with: a rule, a forecast, a repair."""

    rule: Rule
    forecast: Forecast
    repair: Repair
    checked: Callable[["Lane", Step, Mapping[str, Any]], "Lane"] = lambda lane, step, given: lane
    """Asked at a run's first step, with the arguments of ``step``: the lane to go on with."""

    def tensors(self) -> list[Any]:
        """What is kept, for the memory account."""
        outputs = [x for x in (self.forecast.v0, self.forecast.v1) if x is not None]
        return [*outputs, *self.rule.tensors(), *self.repair.tensors()]


def decide(rules: Sequence[Rule], calls: Sequence[Call], scope: DecisionScope) -> list[Decision]:
    """Measure, read everything at once (one host synchronisation), and decide."""
    signals = [rule.measure(call) for rule, call in zip(rules, calls, strict=True)]
    read = scope.read(signals)
    return [rule.decide(call, one) for rule, call, one in zip(rules, calls, read, strict=True)]


def refresh(
    lane: Lane,
    call: Call,
    decision: Decision,
    record: CallRecord,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    name: str,
) -> Any:
    """Step the sampler with a computed output: learn from it, repair what was skipped.

    The output is the argument ``name`` of ``original``, the scheduler's ``step``.
    """
    step, output, latents = call.step, arguments[name], arguments["sample"]
    fresh = as_velocity(output, latents, step)
    lane.rule.computed(call, decision, lane.forecast.missed(step, fresh), record)
    result = lane.repair.refresh(original, arguments, step, fresh, lane.forecast)
    lane.forecast.update(step, fresh)
    return result


def reuse(
    lane: Lane,
    call: Call,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    name: str,
) -> Any:
    """Step the sampler with the forecast, and remember what that owes."""
    step, output, latents = call.step, arguments[name], arguments["sample"]
    forecast = as_output(lane.forecast(step), latents, step)
    arguments[name] = forecast.to(output.dtype)
    return lane.repair.skip(original, arguments, step, lane.forecast.weights(step))


def scaled(latents: Tensor, scale: float) -> Tensor:
    """Latents as the model is given them."""
    return latents if scale == 1.0 else latents.float() * scale
