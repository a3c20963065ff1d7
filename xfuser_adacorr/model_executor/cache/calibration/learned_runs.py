"""What learned correction is fitted from: uncached trajectories, and runs along a schedule."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.adacorrection import NoRepair
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.flow_coordinates import FlowPoint, direction, flow_points
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.methods.auto import Auto
from xfuser_adacorr.model_executor.cache.methods.learned import (
    OnCourse,
    StraightLine,
    cannot_follow,
    latents_of,
    told_guidance,
    unlearnable,
)
from xfuser_adacorr.model_executor.cache.schedulers import Places
from xfuser_adacorr.model_executor.cache.step import Step

from .learned_fit import RIDGE, ROUNDS, ScheduleFit
from .side_by_side import SideBySide, UntilTheEnd

PSNR_CAP_DB = 100.0


class Trajectories:
    """The uncached latents in flow coordinates, for every step and the end: ``[N + 1, R, D]`` a
    call, float32 in memory, or beyond ``memory_limit`` bytes in files of a temporary folder."""

    def __init__(self, num_steps: int, memory_limit: float = math.inf) -> None:
        self.num_steps, self.memory_limit = num_steps, memory_limit
        self._bytes = 0
        self._parts: dict[int, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def note(self, index: int, place: int, y: Tensor) -> None:
        """Keep y ``[R, ...]`` of call ``index`` at step ``place``."""
        if index not in self._parts:
            self._parts[index] = self._room((self.num_steps + 1, len(y), y[0].numel()), index)
        self._parts[index][place] = y.flatten(1).cpu()

    def _room(self, shape: tuple[int, ...], index: int) -> Tensor:
        count = math.prod(shape)
        self._bytes += 4 * count
        if self._bytes <= self.memory_limit:
            return torch.empty(shape)
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="learned-")
        path = str(Path(self._folder.name) / f"{index}.bin")
        return torch.from_file(path, shared=True, size=count).view(shape)

    def at(self, place: int) -> Tensor:
        """y of all calls at a step, ``[K, D]``."""
        return torch.cat([self._parts[index][place] for index in sorted(self._parts)])

    def shape(self, index: int) -> tuple[int, ...]:
        """``(N + 1, R, D)`` of a call's part."""
        return tuple(self._parts[index].shape)

    def check(self) -> None:
        """`ValueError` for latents that are not finite."""
        for index in sorted(self._parts):
            bad = ~self._parts[index].isfinite().all(dim=2).all(dim=0)
            if bad.any():
                raise ValueError(
                    f"prompts: the uncached latents of call {index}, sample "
                    f"{int(bad.nonzero()[0])}, are not finite"
                )


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

        ``rounds`` as in `fit_gap`: of 1 all samples count alike. What a ``known`` fit has in common with it is not computed again, but for the first step.
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
        from xfuser_adacorr.model_executor.cache.refreshes import nearest_steps

        return nearest_steps(range(steps), mean)


class Recorder(NoRepair):
    """Notes the latents of every step of a call."""

    def __init__(self, trajectories: Trajectories, index: int, points: Sequence[FlowPoint]) -> None:
        self.trajectories, self.index, self.points = trajectories, index, points

    def refresh(self, original, arguments, step: Step, fresh, forecast) -> Any:
        unfit = cannot_follow(step, arguments) if step.index == 0 else None
        if unfit is not None:
            raise ValueError(f"calibration: {unfit}")
        self._note(step.index, arguments["sample"])
        result = original(**arguments)
        if step.is_last:
            self._note(step.index + 1, latents_of(result))
        return result

    def _note(self, place: int, latents: Tensor) -> None:
        self.trajectories.note(self.index, place, self.points[place].to_flow(latents))


class _FittedMoves:
    """`StraightLine`'s way to the next refresh, fitted there and then."""

    def __init__(self, loop: ClosedLoop, fit: ScheduleFit, shared: int, index: int) -> None:
        self.loop, self.fit, self.shared, self.index = loop, fit, shared, index

    def __call__(self, k: int, y: Tensor, velocity: Tensor | None) -> Tensor:
        return self.loop.meet(self.fit, self.shared, k, self.index, y, velocity)

    def tensors(self) -> list[Tensor]:
        return []


def psnr(squared_error: Tensor, peak: Tensor) -> Tensor:
    """In dB, at most `PSNR_CAP_DB`."""
    return (10.0 * torch.log10(peak.square() / squared_error)).clamp(max=PSNR_CAP_DB)


def pictures_of(output: Any) -> Tensor:
    """What a pipeline returned first, as float tensors ``[n, ...]``; pictures in [0, 1]."""
    first = next(iter(output.values())) if isinstance(output, dict) else output
    first = first[0] if isinstance(first, tuple) else first
    if isinstance(first, Tensor):
        return first.detach().float().cpu()
    if isinstance(first, numpy.ndarray):
        return torch.from_numpy(first).float()
    parts = [numpy.asarray(_of_frames(each)) for each in first]
    whole = torch.from_numpy(numpy.stack(parts))
    return whole.float() / 255.0 if whole.dtype == torch.uint8 else whole.float()


def _of_frames(picture: Any) -> Any:
    if isinstance(picture, list):  # frames of a clip
        return numpy.stack([numpy.asarray(frame) for frame in picture])
    return picture.cpu() if isinstance(picture, Tensor) else picture
