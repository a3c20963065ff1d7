"""Latents on the straight line between two refreshes, in flow coordinates, in place of a sampler's.

It is the repair of learned plans: where the line leads to is told by the plan.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xfuser_adacorr.model_executor.cache.flow_coordinates import FlowPoint
from xfuser_adacorr.model_executor.cache.step import Step


class StraightLine:
    """Answers every step with the latents on the straight line to the next refresh's.

    ``move(k, y, velocity)`` says where the ``k``-th of the ``schedule``'s steps leads to. The
    sampler's own step is taken too, so that it counts on, and its latents are replaced. What others
    do to the latents between steps (inpainting, a callback) stays in them.
    """

    def __init__(
        self,
        points: Sequence[FlowPoint],
        schedule: Sequence[int],
        direction: float,
        move: Callable[[int, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.points, self.direction, self.move = points, direction, move
        self._ranks = {step: k for k, step in enumerate(schedule)}
        self._ends = [*schedule[1:], len(points) - 1]
        self._line: tuple[int, int] | None = None
        """Steps between which the latents move now."""
        self._way: Tensor | None = None
        self._y: Tensor | None = None
        """Of the latents returned last, before they were rounded."""
        self._returned: Tensor | None = None
        self._version = 0

    def refresh(self, original, arguments, step: Step, fresh: Tensor, forecast) -> Any:
        """Take a computed step; one beyond the schedule (other inputs) only goes along the line."""
        if arguments["model_output"].requires_grad or arguments["sample"].requires_grad:
            return original(**arguments)  # everything is computed then
        return self._moved(original, arguments, step, fresh)

    def skip(self, original, arguments, step: Step) -> Any:
        return self._moved(original, arguments, step, None)

    def _moved(self, original, arguments, step: Step, fresh: Tensor | None) -> Any:
        y, place = self._flow_latents(arguments["sample"], step.index), step.index
        if place in self._ranks:
            k = self._ranks[place]
            velocity = None if fresh is None else fresh * self.direction
            self._way, self._line = self.move(k, y, velocity), (place, self._ends[k])
        self._y = y + self._share(place) * self._way
        result = original(**arguments)
        self._returned = self.points[place + 1].to_latents(self._y, latents_of(result))
        self._version = _version(self._returned)
        return with_latents(result, self._returned)

    def _flow_latents(self, sample: Tensor, place: int) -> Tensor:
        untouched = sample is self._returned and _version(sample) == self._version is not None
        return self._y if untouched else self.points[place].to_flow(sample)

    def _share(self, place: int) -> float:
        """Of the line, what the step at ``place`` covers."""
        start, end = (self.points[at].time for at in self._line)
        if start == end:  # a sampler may take two steps at one time
            return 1.0 / (self._line[1] - self._line[0])
        return (self.points[place + 1].time - self.points[place].time) / (end - start)

    def tensors(self) -> list[Tensor]:
        kept = [x for x in (self._way, self._y, self._returned) if x is not None]
        return [*kept, *self.move.tensors()]


def _version(latents: Tensor) -> int | None:
    """Counts writes into a tensor; None where they are not counted."""
    return None if latents.is_inference() else latents._version


def latents_of(result: Any) -> Tensor:
    """The latents in what ``scheduler.step`` returned."""
    return result if isinstance(result, Tensor) else result[0]


def with_latents(result: Any, latents: Tensor) -> Any:
    """The same result with other latents."""
    if isinstance(result, Tensor):
        return latents
    if isinstance(result, tuple):
        return (latents, *result[1:])
    return type(result)(**{**dict(result), "prev_sample": latents})
