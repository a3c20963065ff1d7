"""What learned correction is fitted from: uncached trajectories, and runs along a schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.adacorrection.straight_line import StraightLine
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.flow_coordinates import direction, flow_points
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.methods.learned import (
    OnCourse,
    told_guidance,
    unlearnable,
)
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .gap_path import gap_costs
from .learned_fit import ScheduleFit
from .pictures import psnr
from .side_by_side import SideBySide, UntilTheEnd
from .together import ALONE, Together
from .trajectories import Recorder, Trajectories

LEAST_SPLIT = 6
"""Prompts from which on every third goes along without being fitted on, to compare schedules."""

DIFFERENT_STEPS = "prompts: all runs must have the same steps; they differ in size?"


class ClosedLoop:
    """Runs a pipeline's calls along schedules, each fitted while it runs."""

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        calls: Sequence[Mapping[str, Any]],
        memory_limit: float = math.inf,
        together: Together = ALONE,
    ) -> None:
        """``calls`` are those of all ranks, of which this one makes its share."""
        self.together, self._first = together, together.first_of(calls)
        self.runs = SideBySide(pipe, models, together.share(calls))
        self._memory_limit = memory_limit
        self.uncached: Trajectories | None = None
        self.places: Places | None = None
        self.rows: list[int] = []
        """Samples of each call."""
        self.fitted: Tensor | None = None
        """``[K]``: whether a sample is fitted on while schedules are compared."""
        self.computed = 0
        """Sampling steps computed so far, each of one call."""

    # -- the uncached runs -----------------------------------------------------------------------

    def record(self, finished: Callable[[int], None] = lambda index: None) -> None:
        """Run every call uncached, and keep its trajectory."""
        begun: set[int] = set()

        def lane(places: Places, stepper: Any, scope: Any) -> Lane:
            self._check_places(places, stepper)
            if self.runs.index in begun:
                raise ValueError(
                    "calibration: a call of the pipeline may have one sampler and one run; this "
                    "one has several"
                )
            begun.add(self.runs.index)
            if self.uncached is None:
                self.uncached = Trajectories(len(places.steps), self._memory_limit)
            rule = OnCourse(range(len(places.steps)))
            recorder = Recorder(self.uncached, self.runs.index, flow_points(places))
            return Lane(rule, LastValue(), UntilTheEnd(recorder, lambda result: None))

        self.runs.run(lane, finished=finished)
        if self.uncached is None:
            raise ValueError("the pipeline took no step that could be recorded")
        with self.together.alike():
            self.uncached.check(self._first)
        if len({tuple(each) for each in self.together.heard(self.places.coordinates)}) > 1:
            raise ValueError(DIFFERENT_STEPS)
        self._count_rows()

    def take_over(self, trajectories: Sequence[Trajectories], places: Places) -> None:
        """Take what was recorded elsewhere, of one call each."""
        self.places, self.uncached = places, Trajectories(len(places.steps))
        self.uncached._parts = {i: each._parts[0] for i, each in enumerate(trajectories)}
        self._count_rows()

    def _count_rows(self) -> None:
        self.rows = [self.uncached.shape(i)[1] for i in range(len(self.runs.calls))]
        prompts: list[int] = []
        for own in self.together.of_calls([self._prompt_of_rows()]):
            first = max(prompts, default=-1) + 1
            prompts += [first + prompt for prompt in own]
        split = max(prompts) + 1 >= LEAST_SPLIT
        self.fitted = torch.tensor(prompts) % 3 != 2 if split else None

    def _prompt_of_rows(self) -> list[int]:
        """Which prompt each sample is of: some pipelines have every prompt's latents twice, one for
        each branch of guidance."""
        found: list[int] = []
        for call, rows in zip(self.runs.calls, self.rows, strict=True):
            count = len(call.get("seeds", [None]))
            count = 1 if rows % count else count
            first = max(found, default=-1) + 1
            found += [first + row % count for row in range(rows)]
        return found

    def _check_places(self, places: Places, stepper: Any) -> None:
        unfit = unlearnable(stepper, places)
        if unfit is not None:
            raise ValueError(f"calibration: {unfit}")
        if self.places is not None and places.coordinates != self.places.coordinates:
            raise ValueError(DIFFERENT_STEPS)
        self.places = places

    @property
    def times(self) -> list[float]:
        return [point.time for point in flow_points(self.places)]

    @property
    def guidance_scale(self) -> float | None:
        """As the pipeline told it."""
        return told_guidance(self.runs.pipes[0])

    # -- along a schedule ------------------------------------------------------------------------

    def follow(
        self,
        schedule: Sequence[int],
        known: ScheduleFit | None = None,
        *,
        everything: bool = False,
    ) -> tuple[ScheduleFit, Tensor]:
        """Fit a schedule: the fit, and the final y ``[K, D]``.

        ``everything``: fitted on all samples, not on the ``fitted`` ones alone. What a ``known``
        fit has in common with it is not computed again, but for the first step.
        """
        fitted = None if everything else self.fitted
        fit = ScheduleFit(schedule, self.times, fitted, samples=self.together.samples)
        shared = fit.begin_as(known) if known is not None else 0
        finals: list[Tensor | None] = [None] * len(self.rows)
        places_computed = {0, *fit.schedule[shared:]}

        def lane(places: Places, stepper: Any, scope: Any) -> Lane:
            index = self.runs.index
            moves = _FittedMoves(self, fit, shared, index)
            line = StraightLine(flow_points(places), fit.schedule, direction(places), moves)

            def ended(result: Any) -> None:
                finals[index] = line._y.flatten(1).cpu()

            return Lane(OnCourse(places_computed), LastValue(), UntilTheEnd(line, ended))

        self._met: dict[int, tuple[Tensor, Tensor]] = {}
        self.runs.run(lane, meeting=True)
        self.computed += len(places_computed) * len(self.rows)
        return fit, torch.cat(finals)

    def meet(
        self, fit: ScheduleFit, shared: int, k: int, index: int, y: Tensor, velocity: Tensor | None
    ) -> Tensor:
        """One call is at the ``k``-th refresh: wait for the others, fit, and return its way."""
        if k >= shared:
            self._met[index] = y.flatten(1).cpu(), velocity.flatten(1).cpu()

        def fitted() -> None:
            if k >= shared:
                met = [self._met[i] for i in range(len(self.rows))]
                fit.refresh(*(torch.cat(parts) for parts in zip(*met, strict=True)))
            fit.fit(k, self.uncached.at(fit.anchors[k]))
            self._ways = fit.move(k).split(self.rows)

        self.runs.meet(fitted)
        return self._ways[index].view(y.shape).to(y.device)

    def psnr_db(self, final: Tensor) -> Tensor:
        """PSNR of the final latents ``[K, D]`` of this rank against the uncached ones, of all
        samples; the peak is their range."""
        wanted = self.uncached.at(self.uncached.num_steps).double()
        squares = (final.double() - wanted).square().sum(dim=1)
        counts = torch.full_like(squares, wanted.shape[1])
        squares, counts = self.together.samples(torch.stack([squares, counts], dim=1)).unbind(dim=1)
        most = self.together.samples(wanted.amax(dim=1), torch.amax)
        least = self.together.samples(wanted.amin(dim=1), torch.amin)
        return psnr(squares / counts, most - least)

    # -- schedules to begin from -----------------------------------------------------------------

    @cached_property
    def gap_costs(self) -> Tensor:
        """Of the uncached trajectories (`gap_path.gap_costs`)."""
        return gap_costs(self.together.samples(self.uncached.gram()))


class _FittedMoves:
    """`StraightLine`'s way to the next refresh, fitted there and then."""

    def __init__(self, loop: ClosedLoop, fit: ScheduleFit, shared: int, index: int) -> None:
        self.loop, self.fit, self.shared, self.index = loop, fit, shared, index

    def __call__(self, k: int, y: Tensor, velocity: Tensor | None) -> Tensor:
        return self.loop.meet(self.fit, self.shared, k, self.index, y, velocity)

    def tensors(self) -> list[Tensor]:
        return []
