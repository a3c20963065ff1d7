"""Compensation for every deterministic sampler: step again with what the outputs should have been.

A multistep sampler keeps earlier outputs and latents, so what reused calls owe cannot be put into
one later output. Its whole state is kept from before the first reused step instead; at the next
refresh the sampler is set back, goes through the reused steps again with cached and fresh outputs
blended, and takes the present step from the latents so found.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.core.blend import blend_weights, curvature_node
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.intercept import handler_of, intercept_step, release
from xfuser_adacorr.model_executor.cache.samplers import RAW_OUTPUT, model_scale, unwrapped

from .compensation import Compensation

STOCHASTIC_ARGUMENTS = ("eta", "s_churn")
"""Arguments of ``step`` that make it draw noise if they are above 0."""


@dataclass(slots=True)
class Node:
    """A step whose output was computed by every branch."""

    coordinate: float
    output: Tensor
    """What `Step.velocity` makes of the output that the sampler was given (after guidance)."""


@dataclass(slots=True)
class SkippedStep:
    """A step whose output was, at least in one branch, forecast."""

    place: Step
    arguments: dict[str, Any]
    """Of ``step``, but for the output and the latents."""
    change: Tensor | None
    """What others (a callback, inpainting) added to the latents before this step."""


@dataclass(slots=True)
class Record:
    """What a replay needs."""

    v0: Node | None = None
    v1: Node | None = None
    latents: Tensor | None = None
    """As given to the first skipped step."""
    sampler_state: list[dict[str, Any]] = field(default_factory=list)
    """Attributes of the scheduler, and of xfuser's wrapper, before that step; lists are copies."""
    skipped: list[SkippedStep] = field(default_factory=list)
    returned: Tensor | None = None
    """The latents that the last skipped step returned, to see whether others replace them."""
    returned_values: Tensor | None = None
    """Copy of them, since others may write into them."""
    returned_version: int = 0


class ReplayCompensation(Compensation):
    """Takes over ``scheduler.step`` for a generation; blends are AdaCorrection's (see `..core`).

    One record serves all branches, since the sampler is given their guided sum. A step counts as
    refreshed if all of its calls were computed; branches that follow a computed one in a step are
    therefore computed too. The last step is never replayed, since nothing could repair it.
    """

    def __init__(
        self,
        stepper: Any,
        timesteps: list[float] | None,
        warn: Callable[[str], None],
        in_patches: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stepper, self.scheduler = stepper, unwrapped(stepper)
        self._holders = [stepper] if stepper is self.scheduler else [stepper, self.scheduler]
        """Whose attributes are the sampler's state."""
        self.record = Record()
        self._host_timesteps = timesteps
        self._timesteps = self.scheduler.timesteps
        self._warn = warn
        self._in_patches = in_patches
        """Whether the sampler is stepped for one patch of the latents after the other."""
        self._calls: list[tuple[Step, bool]] = []
        """Step and outcome of the transformer's calls since the last step."""
        if handler_of(stepper) is not None:  # of a generation that was never ended
            release(stepper)
        self._signature = inspect.signature(stepper.step)
        intercept_step(stepper, self.step)

    def forget(self) -> None:
        """Drop what a replay needs."""
        self.record, self._calls = Record(), []

    def release(self) -> None:
        self.forget()
        if handler_of(self.stepper) == self.step:
            release(self.stepper)

    def called(self, step: Step, refreshed: bool) -> None:
        self._calls = [call for call in self._calls if call[0].index == step.index]
        self._calls.append((step, refreshed))

    def needs_refresh(self, step: Step) -> bool:
        outcomes = [refreshed for past, refreshed in self._calls if past.index == step.index]
        return bool(outcomes) and all(outcomes)

    def held(self) -> list[Tensor]:
        """What is kept here and not by the scheduler itself."""
        own = {id(tensor) for holder in self._holders for tensor in state_tensors(vars(holder))}
        record = self.record
        kept = [
            *(node.output for node in (record.v0, record.v1) if node is not None),
            *(x for x in (record.latents, record.returned_values) if x is not None),
            *(past.change for past in record.skipped if past.change is not None),
            *(tensor for state in record.sampler_state for tensor in state_tensors(state)),
        ]
        return [tensor for tensor in kept if id(tensor) not in own]

    # -- the scheduler's step --------------------------------------------------------------------

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``scheduler.step``, with its arguments and its result."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if not self.can_replay(arguments):
            self.forget()
            return original(*args, **kwargs)
        calls, self._calls = self._calls, []
        try:
            place = calls[0][0]
            if all(refreshed for _, refreshed in calls):
                return self._refresh(original, arguments, place)
            return self._skip(original, arguments, place)
        except BaseException:
            self.record = Record()
            raise

    def can_replay(self, arguments: dict[str, Any]) -> bool:
        """False for a step of another schedule, of another model, or one that draws noise.

        Patches share one sampler, whose state cannot be set back for one of them alone.
        """
        if any(arguments.get(name) for name in STOCHASTIC_ARGUMENTS):
            self._warn(" with noise added in each step")
            return False
        if self._in_patches():
            self._warn(" in PipeFusion's patches")
            return False
        return bool(self._calls) and self.scheduler.timesteps is self._timesteps

    def _skip(self, original: Callable[..., Any], arguments: dict[str, Any], place: Step) -> Any:
        record = self.record
        if record.v0 is None:
            return original(**arguments)
        if not record.skipped:
            record.latents = arguments["sample"]
            record.sampler_state = [_snapshot(holder) for holder in self._holders]
        rest = {k: v for k, v in arguments.items() if k not in ("model_output", "sample")}
        if self._host_timesteps is not None:  # a tensor would be read from the device once more
            rest["timestep"] = self._host_timesteps[place.index]
        change = self._change(arguments["sample"])
        result = original(**arguments)
        record.skipped.append(SkippedStep(place, rest, change))
        record.returned = result[0]
        record.returned_values = result[0].clone()
        record.returned_version = 0 if result[0].is_inference() else result[0]._version
        return result

    def _change(self, sample: Tensor) -> Tensor | None:
        """What was added to the latents since they were returned; None if they are untouched."""
        record = self.record
        if not record.skipped:
            return None
        if sample is record.returned and not sample.is_inference():
            if sample._version == record.returned_version:
                return None
        return sample.float() - record.returned_values.float()

    def _refresh(self, original: Callable[..., Any], arguments: dict[str, Any], place: Step) -> Any:
        record = self.record
        output = arguments["model_output"].detach().to(torch.float32, copy=True)
        if place.velocity != RAW_OUTPUT:
            p, q = place.velocity
            output = p * output + q * self._as_given(arguments["sample"], place)
        fresh = Node(place.coordinate, output)
        if record.skipped and place.remaining > 1:
            change = self._change(arguments["sample"])
            dtype = arguments["model_output"].dtype
            latents = self._replay(original, fresh, change, dtype)
            arguments["sample"] = latents
            if place.velocity != RAW_OUTPUT:
                arguments["model_output"] = self._output(output, latents, place).to(dtype)
        result = original(**arguments)
        repeated = record.v0 is not None and record.v0.coordinate == fresh.coordinate
        self.record = Record(fresh, record.v1 if repeated else record.v0)
        return result

    def _replay(
        self, original: Callable[..., Any], fresh: Node, change: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Set the sampler back, and return the latents it now arrives at."""
        record = self.record
        for holder, state in zip(self._holders, record.sampler_state, strict=True):
            vars(holder).clear()
            vars(holder).update(state)
        latents = record.latents
        for past in record.skipped:
            latents = _changed(latents, past.change)
            blended = self._blend(past.place.coordinate, fresh)
            output = self._output(blended, latents, past.place).to(dtype)
            latents = original(model_output=output, sample=latents, **past.arguments)[0]
        return _changed(latents, change)

    def _output(self, velocity: Tensor, latents: Tensor, place: Step) -> Tensor:
        """The output that is this velocity at these latents."""
        if place.velocity == RAW_OUTPUT:
            return velocity
        p, q = place.velocity
        return (velocity - q * self._as_given(latents, place)) / p

    def _as_given(self, latents: Tensor, place: Step) -> Tensor:
        """Latents as the model is given them, float32."""
        return model_scale(self.scheduler, place.sigma) * latents.float()

    def _blend(self, coordinate: float, fresh: Node) -> Tensor:
        v0, v1 = self.record.v0, self.record.v1
        node = curvature_node(fresh.coordinate, v0.coordinate, v1.coordinate if v1 else None)
        b0, b1, b = blend_weights(coordinate, v0.coordinate, fresh.coordinate, node)
        blended = b0 * v0.output + b * fresh.output
        return blended if node is None else blended + b1 * v1.output


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
