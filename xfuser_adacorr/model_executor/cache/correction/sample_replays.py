"""Replay of each sample of a batch by itself, where samples are refreshed in different calls.

The replays of two samples begin at different steps and have different outputs in place of the
forecasts, but the samplers that can be replayed treat every sample alone. So each sample has a copy
of the sampler that holds its rows of the state, and is replayed there as a batch of one would be.
The pipeline's own sampler is given the joined state after every step.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Size, Tensor

from xfuser_adacorr.core.batch import joined_rows, sample_rows
from xfuser_adacorr.model_executor.cache.intercept import (
    handler_of,
    intercept_step,
    own_attributes,
    release,
)

from .replay import ReplayCompensation, state_tensors


class SampleReplay(ReplayCompensation):
    """Compensation of one sample, on its own copy of the sampler."""

    def __init__(
        self, batch: "SampleReplays", timesteps: list[float] | None, warn: Callable[[str], None]
    ) -> None:
        super().__init__(copy.copy(batch.stepper), timesteps, warn)
        self._batch = batch
        self.carried: Tensor | None = None
        """The latents that the last step returned."""

    def held(self) -> list[Tensor]:
        """With the copy's state: the pipeline's sampler has another one."""
        shared = {id(tensor) for tensor in state_tensors(vars(self._batch.stepper))}
        own = [x for x in state_tensors(vars(self.stepper)) if id(x) not in shared]
        return [*super().held(), *own, *([] if self.carried is None else [self.carried])]

    def release(self) -> None:
        super().release()
        self.carried = None
        self._batch.release()


class SampleReplays:
    """Takes over ``scheduler.step`` of a batch of ``samples``, and steps each of them alone.

    Raises `ValueError` if the sampler is given latents that are not of these samples.
    """

    def __init__(
        self,
        stepper: Any,
        timesteps: list[float] | None,
        warn: Callable[[str], None],
        samples: int,
    ) -> None:
        if handler_of(stepper) is not None:  # of a generation that was never ended
            release(stepper)
        self.stepper = stepper
        self._signature = inspect.signature(stepper.step)
        self._timesteps = stepper.timesteps
        self.replays = [SampleReplay(self, timesteps, warn) for _ in range(samples)]
        self._joined: dict[str, Any] = {}
        """Attributes as the sampler was given them after the last step."""
        self._returned: Tensor | None = None
        self._returned_version = 0
        intercept_step(stepper, self.step)

    def release(self) -> None:
        self._joined, self._returned = {}, None
        if handler_of(self.stepper) == self.step:
            release(self.stepper)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``scheduler.step``, with its arguments and its result."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        ours = self.stepper.timesteps is self._timesteps
        if not (ours and all(replay.can_replay(arguments) for replay in self.replays)):
            for replay in self.replays:
                replay.forget()
            return original(*args, **kwargs)
        shape = arguments["sample"].shape
        if shape[0] % len(self.replays):
            raise ValueError(
                f"per_sample: the transformer was given {len(self.replays)} samples, but the "
                f"scheduler {shape[0]} rows"
            )
        self._hand_out(shape)
        steps = zip(self.replays, self._arguments(arguments), strict=True)
        results = [replay.stepper.step(**own) for replay, own in steps]
        return self._take_in(results)

    def _arguments(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Each sample's; latents that nobody touched are those that its last step returned."""
        sample = arguments["sample"]
        untouched = sample is self._returned and not sample.is_inference()
        untouched = untouched and sample._version == self._returned_version
        count = len(self.replays)
        for index, replay in enumerate(self.replays):
            own = {n: _rows(x, sample.shape, count, index) for n, x in arguments.items()}
            own["model_output"] = sample_rows(arguments["model_output"], count, index)
            if untouched:
                own["sample"] = replay.carried
            yield own

    def _hand_out(self, shape: Size) -> None:
        """Give the copies what was changed in the sampler since it was given the joined state."""
        changed = {
            name: value
            for name, value in own_attributes(self.stepper).items()
            if name not in self._joined or value is not self._joined[name]
        }
        for index, replay in enumerate(self.replays):
            own = {n: _rows(x, shape, len(self.replays), index) for n, x in changed.items()}
            vars(replay.stepper).update(own)

    def _take_in(self, results: Sequence[Any]) -> Any:
        """Give the sampler the joined state; return the joined result."""
        for replay, result in zip(self.replays, results, strict=True):
            replay.carried = result[0]
        shape = results[0][0].shape
        states = [own_attributes(replay.stepper) for replay in self.replays]
        self._joined = {n: _joined([state[n] for state in states], shape) for n in states[0]}
        vars(self.stepper).update(self._joined)
        first = results[0]
        if isinstance(first, tuple):
            result = tuple(_joined(parts, shape) for parts in zip(*results, strict=True))
        else:
            fields = {n: _joined([result[n] for result in results], shape) for n in first}
            result = type(first)(**fields)
        self._returned = result[0]
        self._returned_version = 0 if result[0].is_inference() else result[0]._version
        return result


def _rows(value: Any, shape: Size, samples: int, index: int) -> Any:
    """A copy of one sample's rows of what has the latents' shape, also in lists; else the value.

    A sampler's other tensors are tables of its timesteps, which have one dimension.
    """
    if isinstance(value, list):
        return [_rows(item, shape, samples, index) for item in value]
    if isinstance(value, Tensor) and value.shape == shape:
        return sample_rows(value, samples, index).clone()
    return value


def _joined(parts: Sequence[Any], shape: Size) -> Any:
    """The inverse of `_rows`; ``shape`` is that of one sample's rows."""
    first = parts[0]
    if isinstance(first, list):
        return [_joined(items, shape) for items in zip(*parts, strict=True)]
    if isinstance(first, Tensor) and first.shape == shape:
        return joined_rows(parts)
    return first
