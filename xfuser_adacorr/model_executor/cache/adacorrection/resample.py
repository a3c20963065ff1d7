"""Repair for samplers with a state: set back, and stepped again with cached and fresh blended.

What a multistep sampler does with an output depends on the ones before, so what is owed cannot be
put into one later output. Its whole state is kept from before the first skipped step instead; at
the next refresh the sampler is set back, goes through the skipped steps again, and takes the
present step from the latents so found.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.forecasts import Forecast, as_output
from xfuser_adacorr.model_executor.cache.schedulers import MULTISTEP, is_known_as, unwrapped
from xfuser_adacorr.model_executor.cache.step import Step

from .blend import line_blend, parabola_blend

STOCHASTIC_ARGUMENTS = ("eta", "s_churn")
"""Arguments of ``step`` that make it draw noise if they are above 0."""


@dataclass(slots=True)
class SkippedStep:
    """A step that a forecast was used in."""

    step: Step
    arguments: dict[str, Any]
    """Of ``step``, but for the output and the latents."""
    change: Tensor | None
    """What others (a callback, inpainting) added to the latents before this step."""


class Resample:
    """Keeps the sampler's state from before the first skipped step, for one run.

    ``stepper`` is what the pipeline steps: the scheduler, or xfuser's wrapper of it. ``warn`` is
    called where a step draws noise after all. The last step is never repaired, since nothing could
    follow it.
    """

    def __init__(self, stepper: Any, warn: Callable[[str], None] = lambda circumstance: None):
        scheduler = unwrapped(stepper)
        self._holders = [stepper] if stepper is scheduler else [stepper, scheduler]
        """Whose attributes are the sampler's state."""
        self._warn = warn
        self._blend = parabola_blend if is_known_as(scheduler, MULTISTEP) else line_blend
        self._forget()

    def _forget(self) -> None:
        self._skipped: list[SkippedStep] = []
        self._state: list[dict[str, Any]] = []
        self._latents: Tensor | None = None
        """As given to the first skipped step."""
        self._returned: Tensor | None = None
        self._returned_values: Tensor | None = None
        """Copy of what the last skipped step returned, since others may write into it."""
        self._returned_version = 0

    def skip(self, original: Callable, arguments: dict[str, Any], step: Step) -> Any:
        """Step the sampler with the forecast that ``arguments`` hold."""
        if any(arguments.get(name) for name in STOCHASTIC_ARGUMENTS):
            self._warn(" with noise added in each step")
            self._forget()
            return original(**arguments)
        if not self._skipped:
            self._latents = arguments["sample"]
            self._state = [_snapshot(holder) for holder in self._holders]
        rest = {k: v for k, v in arguments.items() if k not in ("model_output", "sample")}
        rest["timestep"] = step.timestep  # a tensor would be read from the device once more
        change = self._change(arguments["sample"])
        result = original(**arguments)
        returned = result[0]
        self._skipped.append(SkippedStep(step, rest, change))
        self._returned, self._returned_values = returned, returned.clone()
        self._returned_version = 0 if returned.is_inference() else returned._version
        return result

    def refresh(
        self,
        original: Callable,
        arguments: dict[str, Any],
        step: Step,
        fresh: Tensor,
        forecast: Forecast,
    ) -> Any:
        """Step the sampler from where it should have been."""
        if self._skipped and not step.is_last:
            change = self._change(arguments["sample"])
            dtype = arguments["model_output"].dtype
            latents = self._resampled(original, step, fresh, forecast, change, dtype)
            arguments["sample"] = latents
            arguments["model_output"] = as_output(fresh, latents, step).to(dtype)
        self._forget()
        return original(**arguments)

    def _change(self, sample: Tensor) -> Tensor | None:
        """What was added to the latents since they were returned; None if they are untouched."""
        if not self._skipped:
            return None
        if sample is self._returned and not sample.is_inference():
            if sample._version == self._returned_version:
                return None
        return sample.float() - self._returned_values.float()

    def _resampled(
        self, original, step: Step, fresh: Tensor, forecast: Forecast, change: Tensor | None, dtype
    ) -> Tensor:
        """Set the sampler back, and return the latents it now arrives at."""
        for holder, state in zip(self._holders, self._state, strict=True):
            vars(holder).clear()
            vars(holder).update(state)
        latents = self._latents
        for past in self._skipped:
            latents = _changed(latents, past.change)
            blended = self._blended(past.step, step, fresh, forecast)
            output = as_output(blended, latents, past.step).to(dtype)
            latents = original(model_output=output, sample=latents, **past.arguments)[0]
        return _changed(latents, change)

    def _blended(self, past: Step, step: Step, fresh: Tensor, forecast: Forecast) -> Tensor:
        """What a skipped step should have used, out of the refreshes around it.

        Its forecast again where that is ``lost``: see `EulerRepair.pay`.
        """
        t1 = None if forecast.v1 is None else forecast.t1
        b0, b1, b = self._blend(past.coordinate, step.coordinate, forecast.t0, t1)
        blended = b0 * forecast.v0 + b * fresh
        if b1 != 0.0:
            blended = blended + b1 * forecast.v1
        if forecast.lost is None:
            return blended
        return torch.where(forecast.lost, forecast(past), blended)

    def tensors(self) -> list[Tensor]:
        """What is kept here and not by the scheduler itself."""
        own = {id(tensor) for holder in self._holders for tensor in state_tensors(vars(holder))}
        kept = [
            *(x for x in (self._latents, self._returned_values) if x is not None),
            *(past.change for past in self._skipped if past.change is not None),
            *(tensor for state in self._state for tensor in state_tensors(state)),
        ]
        return [tensor for tensor in kept if id(tensor) not in own]


def _changed(latents: Tensor, change: Tensor | None) -> Tensor:
    return latents if change is None else (latents.float() + change).to(latents.dtype)


def _snapshot(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes; lists are copied, since samplers shift their entries in place."""
    return {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}


def state_tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors among the values of a scheduler's attributes and in its lists."""
    for value in state.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                yield item
