"""The main flow: decide, then compute, learn and repair, or extrapolate."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adacorrection import Repair
from .forecasts import Forecast, as_output, as_velocity
from .methods.base import Call, Decision, Rule
from .ranks import DecisionScope
from .signals import read
from .step import RAW_OUTPUT, Step
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
    values = read(signals, scope)
    return [rule.decide(call, own) for rule, call, own in zip(rules, calls, values, strict=True)]


def check_decision(
    scope: DecisionScope, step: Step, decision: Decision, device: torch.device
) -> None:
    """Raise on all ranks if one decided differently, before anything can hang."""
    if not scope.check_ranks:
        return
    decided = (step.index, decision.why, decision.run_blocks)
    scope.check(
        step.index,
        decision.compute,
        zlib.crc32(repr(decided).encode()),
        (decision.base_signal, decision.weight, decision.temporal),
        device,
    )


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
    step, call.latents = call.step, arguments["sample"]
    fresh = as_velocity(arguments[name], call.latents, step)
    lane.rule.computed(call, decision, lane.forecast.missed(step, fresh), record)
    result = lane.repair.refresh(original, arguments, step, fresh, lane.forecast)
    lane.forecast.update(step, fresh)
    return result


def reuse(
    lane: Lane, call: Call, original: Callable[..., Any], arguments: dict[str, Any], name: str
) -> Any:
    """Step the sampler with the forecast, and remember the step for the repair."""
    forecast = lane.forecast(call.step)
    if call.step.velocity != RAW_OUTPUT:  # the model predicts the noise, or the picture
        forecast = as_output(forecast, arguments["sample"], call.step)
    arguments[name] = forecast.to(arguments[name].dtype)
    return lane.repair.skip(original, arguments, call.step)
