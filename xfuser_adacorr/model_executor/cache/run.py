"""All state of one run, and when a run begins, goes on, and ends."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adacorrection import warn_once
from .diffusers_adapters.others import check_alone
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
    signature: inspect.Signature
    """Of the sampler's ``step``, with ``self``."""
    output: str = "model_output"
    """The argument of ``step`` that the sampler follows: the picture, where it is given (EDM)."""
    lane: Lane | None = None
    last: int | None = None
    """Which of ``places.steps`` was taken last."""
    returned: Tensor | None = None
    """Latents that the last step returned."""
    guessed_begin: int | None = None
    """The run's first step, where the scheduler has no word for it (`place_first`)."""

    def arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What ``step`` is called with, by name."""
        arguments = dict(self.signature.bind(self.stepper, *args, **kwargs).arguments)
        del arguments["self"]
        return arguments | arguments.pop("kwargs", {})

    def place(self, timestep: Any) -> int | None:
        """Which of the run's steps the sampler takes now; None beyond them."""
        place = getattr(self.stepper, "step_index", None)
        if place is None and self.last is not None:
            place = self.last + 1
        if place is None:
            place = getattr(self.stepper, "begin_index", None)
        if place is None:  # read once a run
            place = self.places.nearest(float(torch.as_tensor(timestep).flatten()[0]))
        return place if 0 <= place < len(self.places.steps) else None

    def place_first(self, fraction: float) -> None:
        """Guess the run's first step: it is at this fraction of the timestep at pure noise."""
        length = getattr(self.stepper.config, "num_train_timesteps", None)
        self.guessed_begin = 0 if length is None else self.places.nearest(fraction * length)

    @property
    def begin(self) -> int:
        """The step that a run begins with, as far as that is known before it is taken."""
        return getattr(self.stepper, "begin_index", self.guessed_begin) or 0


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

    def ahead(self) -> list[tuple[Track, Step]]:
        """The samplers that step next, with their step to come; some may never be stepped."""
        tracks, ahead = self.tracks.values(), []
        for track in [each for each in tracks if each.last is not None] or tracks:
            place = track.begin if track.last is None else track.last + 1
            if place < len(track.places.steps):
                ahead.append((track, track.places.steps[place]))
        return ahead

    def stand_aside(self) -> None:
        """Compute this step, which records gradients, whatever would have been decided."""
        self.gradients, self.decision = True, Decision(True, "autograd")
        if ahead := self.ahead():
            self.record = record_of(STEP_CONTEXT, ahead[0][1], self.decision)

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


class _OfThread(threading.local):
    """What each thread has of its own."""

    run: Run | None = None
    context: str = "default"
    """The name that `RunTracker.context` gives to calls."""

    def __init__(self) -> None:
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        """The timesteps that runs were begun with, by scheduler; weak references, both."""

    def has_seen(self, scheduler: Any) -> bool:
        known = self.seen.get(scheduler)
        return known is not None and known() is scheduler.timesteps


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
        self._local = _OfThread()
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
        return self._local.run

    def reset(self) -> None:
        """End this thread's run; its trace stays for `summary`."""
        if self._local.run is not None:
            self._local.run.forget()
            self._local.run = None

    def summary(self) -> CacheSummary:
        run = self.latest
        return (
            summary_of(run.trace, run.peak_bytes)
            if run
            else summary_of(new_trace(self._site.method))
        )

    @contextmanager
    def context(self, name: str):
        """Names the calls made inside, as ``CacheMixin.cache_context`` does."""
        outer, self._local.context = self._local.context, name
        try:
            yield
        finally:
            self._local.context = outer

    def _begin(self, schedulers: Iterable[Any]) -> None:
        """Begin a run of the schedulers, which were set to new timesteps."""
        self.reset()
        check_alone(self.denoisers.values())
        self.latest = self._local.run = run = Run(new_trace(self._site.method))
        for scheduler in schedulers:
            self._local.seen[scheduler] = weakref.ref(scheduler.timesteps)
            run.tracks[id(scheduler)] = _new_track(scheduler)

    # -- calls and steps -------------------------------------------------------------------------

    def call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        local, now = self._local, list(self.find_schedulers())
        if now != self._schedulers or any(handler_of(each) != self.step for each in now):
            self._take_schedulers()
        # set_timesteps makes new tensors for every run
        fresh = [
            each
            for each in (*self._schedulers, *self._copies)
            if each.timesteps is not None and not local.has_seen(each)
        ]
        if fresh:
            self._begin(fresh)
        run = local.run
        if run is None or run.finished:
            return original(*args, **kwargs)
        try:
            key = run.enter(name, local.context)
            return self._site.answer_call(run, key, original, args, kwargs)
        except BaseException:
            self.reset()
            raise

    def step(self, stepper: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer ``stepper.step(...)``."""
        run = self._local.run
        if run is None or run.finished or not run.made:
            return original(*args, **kwargs)
        track = run.tracks.get(id(stepper))
        if track is not None and track.timesteps is not stepper.timesteps:
            return original(*args, **kwargs)  # set_timesteps, and no denoiser call since
        try:
            if track is None:
                track = run.tracks[id(stepper)] = _new_track(stepper)
            arguments = track.arguments(args, kwargs)
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
        if not run.ahead():
            run.account_memory()
            run.forget()
            say_if_idle(run.trace)
        return result


def _new_track(stepper: Any) -> Track:
    scheduler = unwrapped(stepper)
    return Track(
        stepper,
        scheduler.timesteps,
        read_places(scheduler),
        inspect.signature(type(stepper).step),
    )


def _release(schedulers: Iterable[Any], handler: Callable[..., Any]) -> None:
    """Give back those of the schedulers that ``handler`` still has."""
    for scheduler in schedulers:
        if handler_of(scheduler) == handler:
            release(scheduler)
