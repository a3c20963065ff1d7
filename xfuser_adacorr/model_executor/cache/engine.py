"""The main flow: decide, then compute, learn and repair, or extrapolate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .adacorrection import Repair
from .adacorrection.velocity import as_output, as_velocity
from .forecasts import Forecast
from .methods.base import Call, Decision, Read, Rule, Signal
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
    values = read(signals, scope)
    return [rule.decide(call, one) for rule, call, one in zip(rules, calls, values, strict=True)]


def read(signals: Sequence[Signal], scope: DecisionScope) -> list[Read]:
    """The values of the signals: one reduction over ranks, one transfer to the host."""
    groups = {
        f"{kind} {i}": getattr(signal, kind)
        for i, signal in enumerate(signals)
        for kind in ("inside", "outside", "local")
    }
    kinds = ("inside", "outside") if scope.latents_are_split else ("inside",)
    found = scope.read_groups(groups, [name for name in groups if name.split()[0] in kinds])
    return [
        Read(found[f"inside {i}"], found[f"outside {i}"], found[f"local {i}"])
        for i in range(len(signals))
    ]


def refresh(
    lane: Lane,
    call: Call,
    decision: Decision,
    record: CallRecord,
    original: Callable[..., Any],
    arguments: dict[str, Any],
) -> Any:
    """Step the sampler with a computed output: learn from it, repair what was skipped."""
    name = output_name(arguments)
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
) -> Any:
    """Step the sampler with the forecast, and remember what that owes."""
    name = output_name(arguments)
    step, output, latents = call.step, arguments[name], arguments["sample"]
    forecast = as_output(lane.forecast(step), latents, step)
    arguments[name] = forecast.to(output.dtype)
    return lane.repair.skip(original, arguments, step, lane.forecast.weights(step))


def scaled(latents: Tensor, scale: float) -> Tensor:
    """Latents as the model is given them."""
    return latents if scale == 1.0 else latents.float() * scale


def output_name(arguments: Mapping[str, Any]) -> str:
    """The argument of ``step`` that the sampler follows: the picture, where it is given (EDM)."""
    given = arguments.get("pred_original_sample")
    return "pred_original_sample" if isinstance(given, Tensor) else "model_output"
