"""What learned correction is fitted from: uncached trajectories, and runs along a schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.adacorrection.straight_line import StraightLine
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.flow_coordinates import direction, flow_points
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.methods.auto import Auto
from xfuser_adacorr.model_executor.cache.methods.learned import (
    OnCourse,
    told_guidance,
    unlearnable,
)
from xfuser_adacorr.model_executor.cache.refreshes import nearest_steps
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .learned_fit import RIDGE, ROUNDS, ScheduleFit
from .pictures import pictures_of, psnr
from .side_by_side import SideBySide, UntilTheEnd
from .trajectories import Recorder, Trajectories


class ClosedLoop:
    """Runs a pipeline's calls along schedules, each fitted while it runs."""

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        calls: Sequence[Mapping[str, Any]],
        memory_limit: float = math.inf,
    ) -> None:
        self.runs = SideBySide(pipe, models, calls)
        self._memory_limit = memory_limit
        self.uncached: Trajectories | None = None
        self.pictures: list[Tensor] = []
        self.places: Places | None = None
        self.rows: list[int] = []
        """Samples of each call."""
        self.fitted: Tensor | None = None
        self.computed = 0
        """Sampling steps computed so far, each of one call."""

    # -- the uncached runs -----------------------------------------------------------------------

    def record(self, finished: Callable[[int], None] = lambda index: None) -> None:
        """Run every call uncached, and keep its trajectory and its pictures."""
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
            return Lane(rule, LastValue(), recorder)

        outputs, _ = self.runs.run(lane, finished=finished)
        if self.uncached is None:
            raise ValueError("the pipeline took no step that could be recorded")
        self.uncached.check()
        self.pictures = [pictures_of(output) for output in outputs]
        self.rows = [self.uncached.shape(i)[1] for i in range(len(self.runs.calls))]

    def take_over(self, trajectories: Sequence[Trajectories], places: Places) -> None:
        """Take what was recorded elsewhere, of one call each, all of it to be fitted on."""
        self.places, self.uncached = places, Trajectories(len(places.steps))
        self.uncached._parts = {i: each._parts[0] for i, each in enumerate(trajectories)}
        self.rows = [self.uncached.shape(i)[1] for i in range(len(trajectories))]
        self.fitted = torch.ones(sum(self.rows), dtype=torch.bool)

    def _check_places(self, places: Places, stepper: Any) -> None:
        unfit = unlearnable(stepper, places)
        if unfit is not None:
            raise ValueError(f"calibration: {unfit}")
        if self.places is not None and places.coordinates != self.places.coordinates:
            raise ValueError("prompts: all runs must have the same steps; they differ in size?")
        self.places = places

    @property
    def times(self) -> list[float]:
        return [point.time for point in flow_points(self.places)]

    @property
    def guidance_scale(self) -> float | None:
        """As the pipeline told it."""
        return told_guidance(self.runs.pipes[0])

    def hold_out(self, prompts: int) -> None:
        """Leave the last prompts out of what is fitted."""
        counts = [len(call["seeds"]) for call in self.runs.calls]
        keep, flags, before = sum(counts) - prompts, [], 0
        for count, rows in zip(counts, self.rows, strict=True):
            if rows % count:
                raise ValueError(
                    f"prompts: a call with {count} prompts has latents of {rows} samples, which "
                    "cannot be told apart; use batch_size=1"
                )
            flags += [before + row % count < keep for row in range(rows)]
            before += count
        self.fitted = torch.tensor(flags)

    # -- along a schedule ------------------------------------------------------------------------

    def follow(
        self,
        schedule: Sequence[int],
        known: ScheduleFit | None = None,
        *,
        rounds: int = ROUNDS,
        to_the_end: bool = False,
    ) -> tuple[ScheduleFit, Tensor, list[Any]]:
        """Fit a schedule: the fit, the final y ``[K, D]``, and the outputs if ``to_the_end``.

        ``rounds`` as in `fit_gap`: of 1 all samples count alike. What a ``known`` fit has in
        common with it is not computed again, but for the first step.
        """
        fit = ScheduleFit(schedule, self.times, self.fitted, RIDGE, rounds)
        shared = fit.begin_as(known) if known is not None else 0
        finals: list[Tensor | None] = [None] * len(self.rows)
        places_computed = {0, *fit.schedule[shared:]}

        def lane(places: Places, stepper: Any, scope: Any) -> Lane:
            index = self.runs.index
            moves = _FittedMoves(self, fit, shared, index)
            line = StraightLine(flow_points(places), fit.schedule, direction(places), moves)

            def ended(result: Any) -> None:
                finals[index] = line._y.flatten(1).cpu()

            repair = line if to_the_end else UntilTheEnd(line, ended)
            return Lane(OnCourse(places_computed), LastValue(), repair)

        self._met: dict[int, tuple[Tensor, Tensor]] = {}
        outputs, _ = self.runs.run(lane, meeting=True)
        self.computed += len(places_computed) * len(self.rows)
        final = torch.empty(0) if to_the_end else torch.cat(finals)
        return fit, final, outputs

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
        """PSNR of the final latents against the uncached ones, ``[K]``; the peak is their range."""
        wanted = self.uncached.at(self.uncached.num_steps).double()
        peak = wanted.amax(dim=1) - wanted.amin(dim=1)
        return psnr((final.double() - wanted).square().mean(dim=1), peak)

    def picture_psnr_db(self, outputs: Sequence[Any]) -> Tensor:
        """PSNR of every picture against the uncached one, in the order of the prompts."""
        found = []
        for output, wanted in zip(outputs, self.pictures, strict=True):
            made = pictures_of(output)
            low, high = wanted.min(), wanted.max()
            peak = torch.ones(()) if low >= 0.0 and high <= 1.0 else high - low
            found.append(psnr((made - wanted).square().flatten(1).mean(dim=1), peak))
        return torch.cat(found)

    def unseen_mean(self, values: Tensor) -> float:
        """Mean of ``[K]`` over the samples held out; over all of them where there are none."""
        unseen = values[~self.fitted]
        return float((unseen if len(unseen) else values).mean())

    def unseen_pictures(self, values: Tensor) -> Tensor:
        """Those of the prompts held out, of one value a prompt; all where there are none."""
        flags, row = [], 0
        for call, rows in zip(self.runs.calls, self.rows, strict=True):
            flags += self.fitted[row : row + len(call["seeds"])].tolist()
            row += rows
        unseen = values[~torch.tensor(flags)] if len(flags) == len(values) else values
        return unseen if len(unseen) else values

    # -- the steps that Auto takes ---------------------------------------------------------------

    def auto_steps(self, count: int, calls: int) -> tuple[int, ...]:
        """The steps that `Auto` computes with a budget of ``count``, averaged over the calls."""
        steps = len(self.places.steps)
        method = Auto(target_compute=count / steps, use_plan=False)

        def lane(places: Places, stepper: Any, scope: Any) -> Lane:
            own = method.make_lane(places, 0, {}, stepper, scope)
            own.repair = UntilTheEnd(own.repair, lambda result: None)
            return own

        some = self.runs.first(calls)
        _, traces = some.run(lane)
        self.computed += count * calls
        taken = [[c.step_index for c in trace.calls if c.refreshed] for trace in traces]
        length = min(count, *(len(each) for each in taken))
        mean = [sum(each[k] for each in taken) / len(taken) for k in range(length)]
        return nearest_steps(range(steps), mean)


class _FittedMoves:
    """`StraightLine`'s way to the next refresh, fitted there and then."""

    def __init__(self, loop: ClosedLoop, fit: ScheduleFit, shared: int, index: int) -> None:
        self.loop, self.fit, self.shared, self.index = loop, fit, shared, index

    def __call__(self, k: int, y: Tensor, velocity: Tensor | None) -> Tensor:
        return self.loop.meet(self.fit, self.shared, k, self.index, y, velocity)

    def tensors(self) -> list[Tensor]:
        return []
