"""All state of one run, and when a run begins, goes on, and ends."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .adacorrection import warn_once
from .engine import Lane
from .inputs import Inputs
from .intercept import InterceptedModel, handler_of, intercept, intercept_step, release
from .methods.base import Call, Decision, StackRule
from .schedulers import Places, check_scheduler, read_places, unwrapped
from .step import Step
from .trace import (
    STEP_CONTEXT,
    CacheSummary,
    CallRecord,
    Trace,
    idle_message,
    new_trace,
    record_of,
    summary_of,
    tensor_bytes,
)

Key = tuple[str, str, int]
"""A denoiser call within a step: component, cache context, how many such calls came before."""


def say_if_idle(trace: Trace) -> None:
    """Warn, once a process, where the cache never acted in a run."""
    message = idle_message(trace)
    if message is not None:
        warn_once(message)


@cache
def _step_signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.step)


@dataclass(slots=True)
class Slot:
    """A denoiser call of a step, as last made and as last computed."""

    output: Any
    """What the last computed call returned."""
    inputs: Inputs


@dataclass(slots=True)
class Track:
    """One sampler of a run: where it stands, and what its steps are cached with."""

    stepper: Any
    timesteps: Tensor
    """The run's: another object is another run."""
    places: Places
    lane: Lane | None = None
    last: int | None = None
    """Which of ``places.steps`` was taken last."""
    returned: Tensor | None = None
    """Latents that the last step returned."""

    def place(self, timestep: Any) -> int | None:
        """Which of the run's steps the sampler takes now; None beyond them."""
        scheduler = unwrapped(self.stepper)
        place = getattr(scheduler, "step_index", None)
        if place is None and self.last is not None:
            place = self.last + 1
        if place is None:
            place = getattr(scheduler, "begin_index", None)
        if place is None:  # read once a run
            place = self.places.nearest(float(torch.as_tensor(timestep).flatten()[0]))
        return place if 0 <= place < len(self.places.steps) else None

    @property
    def begin(self) -> int:
        """The step that a run begins with, as far as the scheduler knows it."""
        return getattr(unwrapped(self.stepper), "begin_index", None) or 0

    @property
    def next_step(self) -> Step | None:
        """The step to come."""
        place = self.begin if self.last is None else self.last + 1
        return self.places.steps[place] if place < len(self.places.steps) else None

    @property
    def is_over(self) -> bool:
        return self.last == len(self.places.steps) - 1


@dataclass(slots=True)
class Run:
    """Everything that is forgotten when the next run begins."""

    trace: Trace
    tracks: dict[int, Track] = field(default_factory=dict)
    """By the identity of the scheduler."""
    slots: dict[Key, Slot] = field(default_factory=dict)
    branches: dict[Key, StackRule] = field(default_factory=dict)
    """Methods inside the models: the state of each call of a step."""
    layouts: dict[Key, tuple] = field(default_factory=dict)
    """Shapes that each of these calls was made with."""
    made: dict[Key, bool] = field(default_factory=dict)
    """Calls since the last step; whether they were computed."""
    last_made: tuple[Key, ...] = ()
    """Those of the step before."""
    cost: float = 0.0
    """Compute of this step's calls, in calls."""
    stepped: bool = False
    decision: Decision | None = None
    """For the calls of this step; None before the first one."""
    decided: dict[int, tuple[Call, Decision]] = field(default_factory=dict)
    """What was decided, and about what, by the scheduler's identity."""
    record: CallRecord | None = None
    inputs_changed: bool = False
    lines_broken: bool = False
    """The step's guided output is made of other calls, or other inputs, than the ones before."""
    gradients: bool = False
    peak_bytes: int = 0
    finished: bool = False

    def enter(self, name: str, context: str) -> Key:
        """A denoiser is called: the key of the call; begins the next step after a step."""
        if self.stepped:
            self.last_made = tuple(self.made)
            self.stepped, self.decision, self.record, self.cost = False, None, None, 0.0
            self.made.clear()
            self.decided.clear()
        count = sum(key[:2] == (name, context) for key in self.made)
        key = (name, context, count)
        self.made[key] = False
        return key

    def tracks_ahead(self) -> list[Track]:
        """The samplers that step next, with a step to come; some may never be stepped."""
        tracks = list(self.tracks.values())
        stepped = [track for track in tracks if track.last is not None]
        return [track for track in stepped or tracks if track.next_step is not None]

    def current_step(self) -> Step | None:
        """Where the samplers that are stepped stand; None beyond their steps."""
        tracks = self.tracks_ahead()
        return tracks[0].next_step if tracks else None

    def note(self, step: Step, computed: bool) -> None:
        """Account for the calls of the step that ends."""
        record = self.record or record_of(STEP_CONTEXT, step, Decision(computed, "first"))
        self.record, made = record, tuple(self.made)
        record.step_index, record.sigma = step.index, step.sigma  # not known before a late start
        if computed and not record.refreshed:
            record.reason = "inputs"
        record.refreshed, record.calls = computed, len(made)
        record.computed_calls = sum(self.made.values())
        record.compute_fraction = min(self.cost / len(made), 1.0)
        self.trace.calls.append(record)
        changed = self.inputs_changed or bool(self.last_made and made != self.last_made)
        self.inputs_changed, self.lines_broken = changed and not computed, changed

    def account_memory(self) -> None:
        lanes = [track.lane.tensors() for track in self.tracks.values() if track.lane]
        states = [rule.tensors() for rule in self.branches.values()]
        outputs = [slot.output for slot in self.slots.values()]
        self.peak_bytes = max(self.peak_bytes, tensor_bytes([lanes, states, outputs]))

    def forget(self) -> None:
        """Let go of all tensors; the trace stays."""
        self.tracks, self.slots, self.branches, self.layouts = {}, {}, {}, {}
        self.decided, self.decision, self.finished = {}, None, True


class RunTracker:
    """Takes over the calls of denoisers and the steps of schedulers, and knows which run they are.

    A run begins with the first denoiser call after ``set_timesteps`` and ends with its last step,
    an exception, `reset`, or the next one. Every thread has runs of its own. Calls outside of a run
    are left alone.

    ``site.answer_call(run, key, original, args, kwargs)`` answers a denoiser call within a run,
    ``site.answer_step(run, track, step, original, arguments)`` a step, under ``site.method``.
    ``stacks`` are the blocks of the denoisers (`sites.stack.Stack`), taken over with them.
    """

    def __init__(
        self,
        site: Any,
        denoisers: Mapping[str, nn.Module],
        find_schedulers: Callable[[], Iterable[Any]],
        stacks: Mapping[str, Any],
    ) -> None:
        self._site, self._stacks = site, stacks
        self.denoisers, self.find_schedulers = dict(denoisers), find_schedulers
        self._local = threading.local()
        self._schedulers: list[Any] = []
        self._copies: weakref.WeakSet = weakref.WeakSet()
        """Of the schedulers, which some pipelines step too, or alone."""
        self.latest: Run | None = None
        """The run that began last, in any thread."""

    # -- taking over -----------------------------------------------------------------------------

    def install(self) -> None:
        for scheduler in self.find_schedulers():
            check_scheduler(scheduler)
        for name, module in self.denoisers.items():
            intercept(module, partial(self.call, name), self._site, InterceptedModel)
        for stack in self._stacks.values():
            stack.install()
        self._take_schedulers()

    def uninstall(self) -> None:
        self.reset()
        _release([*self._schedulers, *self._copies], self.step)
        self._schedulers = []
        for stack in self._stacks.values():
            stack.uninstall()
        for module in self.denoisers.values():
            release(module)

    def _take_schedulers(self) -> None:
        """Take over schedulers that came since, or that another cache had; let go of others."""
        current = list(self.find_schedulers())
        gone = [x for x in self._schedulers if not any(x is other for other in current)]
        _release(gone, self.step)
        for scheduler in current:
            if handler_of(scheduler) != self.step:
                check_scheduler(scheduler)
                intercept_step(scheduler, self.step)
        self._schedulers = current

    def copied(self, scheduler: Any) -> None:
        """One of the schedulers was copied."""
        self._copies.add(scheduler)

    # -- runs ------------------------------------------------------------------------------------

    @property
    def run(self) -> Run | None:
        """This thread's run."""
        return getattr(self._local, "run", None)

    def reset(self) -> None:
        """End this thread's run; its trace stays for `summary`."""
        if self.run is not None:
            self.run.forget()
            self._local.run = None

    def summary(self) -> CacheSummary:
        run = self.latest
        return (
            summary_of(run.trace, run.peak_bytes)
            if run
            else summary_of(new_trace(self._site.method))
        )

    @property
    def context_name(self) -> str:
        return getattr(self._local, "context", "default")

    @contextmanager
    def context(self, name: str):
        """Names the calls made inside, as ``CacheMixin.cache_context`` does."""
        outer = self.context_name
        self._local.context = name
        try:
            yield
        finally:
            self._local.context = outer

    def _begin_after_set_timesteps(self) -> None:
        """Begin a run, once for every ``set_timesteps``: it makes new tensors for each."""
        seen = self._local.__dict__.setdefault("seen", weakref.WeakKeyDictionary())
        fresh = []
        for scheduler in (*self._schedulers, *self._copies):
            timesteps = unwrapped(scheduler).timesteps
            if timesteps is not None and seen.get(scheduler) is not timesteps:
                seen[scheduler] = timesteps
                fresh.append(scheduler)
        if not fresh:
            return
        self.reset()
        self.latest = self._local.run = Run(new_trace(self._site.method))
        for scheduler in fresh:
            self._track(self.run, scheduler)

    # -- calls and steps -------------------------------------------------------------------------

    def call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        self._take_schedulers()
        self._begin_after_set_timesteps()
        run = self.run
        if run is None or run.finished:
            return original(*args, **kwargs)
        try:
            return self._site.answer_call(
                run, run.enter(name, self.context_name), original, args, kwargs
            )
        except BaseException:
            self.reset()
            raise

    def step(self, stepper: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer ``stepper.step(...)``."""
        run = self.run
        if run is None or run.finished or not run.made:
            return original(*args, **kwargs)
        known = run.tracks.get(id(stepper))
        if known is not None and known.timesteps is not unwrapped(stepper).timesteps:
            return original(*args, **kwargs)  # set_timesteps, and no denoiser call since
        arguments = dict(_step_signature(type(stepper)).bind(stepper, *args, **kwargs).arguments)
        del arguments["self"]
        arguments |= arguments.pop("kwargs", {})
        try:
            track = self._track(run, stepper)
            place = track.place(arguments["timestep"])
            if place is None:
                return original(**arguments)
            step = track.places.steps[place]
            result = self._site.answer_step(run, track, step, original, arguments)
        except BaseException:
            self.reset()
            raise
        run.stepped = True
        track.last = place
        track.returned = result if isinstance(result, Tensor) else result[0]
        if all(each.is_over for each in run.tracks.values() if each.last is not None):
            run.account_memory()
            run.forget()
            say_if_idle(run.trace)
        return result

    def _track(self, run: Run, stepper: Any) -> Track:
        track, scheduler = run.tracks.get(id(stepper)), unwrapped(stepper)
        if track is None:
            track = Track(stepper, scheduler.timesteps, read_places(scheduler))
            run.tracks[id(stepper)] = track
        return track


def _release(schedulers: Iterable[Any], handler: Callable[..., Any]) -> None:
    """Give back those of the schedulers that ``handler`` still has."""
    for scheduler in schedulers:
        if handler_of(scheduler) == handler:
            release(scheduler)
