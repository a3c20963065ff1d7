"""All state of one run, and when a run begins, goes on, and ends."""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .diffusers_adapters.others import check_alone
from .intercept import (
    HANDLER,
    Context,
    InterceptedModel,
    handler_of,
    intercept,
    intercept_step,
    release,
)
from .methods.base import Call, Decision, StackRule
from .schedulers import check_scheduler
from .step import Step
from .trace import (
    STEP_CONTEXT,
    CacheSummary,
    CallRecord,
    Trace,
    new_trace,
    summary_of,
    tensor_bytes,
    warn_if_idle,
)
from .track import Track, track_of

Key = tuple[str, str, int]
"""A denoiser call within a step: component, cache context, how many such calls came before."""


@dataclass(slots=True)
class Slot:
    """A denoiser call of a step: what it was last given, and what it last computed."""

    output: Any = None
    layout: list[Any] | None = None
    """Structure, shapes and kinds of what it was given; None before the first call."""
    _given: dict[Any, tuple[weakref.ref | None, Any]] = field(default_factory=dict)
    """What tells whether a leaf is the same: the tensor, and its version, or the number."""
    _constant: dict[Any, bool] = field(default_factory=dict)
    """Of each leaf that was there in two calls, whether it was the same in the first two."""

    def follows(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether all that stayed the same so far still does; learns from each call.

        What is new in the second call is taken to be new in every call. What is the same there has
        to stay, also where another leaf has changed, or its shape.
        """
        leaves, structure = pytree.tree_flatten_with_path((args, dict(kwargs)))
        layout, given, changed = [structure], {}, False
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                base = leaf if leaf._base is None else leaf._base  # of views, which are made anew
                version = None if leaf.is_inference() else leaf._version
                layout.append((leaf.shape, leaf.dtype, leaf.device))
                given[path] = weakref.ref(base), (leaf.storage_offset(), version)
            else:
                base = None
                kept = isinstance(leaf, (bool, str, type(None)))
                layout.append(leaf if kept else type(leaf))
                given[path] = None, leaf if isinstance(leaf, (int, float)) else type(leaf)
            if path in self._given:
                ref, value = self._given[path]
                same = (ref and ref()) is base and value == given[path][1]
                changed |= self._constant.setdefault(path, same) and not same
        follows = layout == self.layout and not changed
        self.layout, self._given = layout, given
        return follows


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

    def next_step(self) -> Step | None:
        """The step to come, of the first sampler that has one."""
        return next((each.upcoming for each in self.tracks.values() if each.upcoming), None)

    def note(self, step: Step, computed: bool) -> None:
        """Account for the calls of the step that ends."""
        made, decision = tuple(self.made), self.decision or Decision(computed, "first")
        self.record = CallRecord(
            STEP_CONTEXT,
            step.index,
            step.sigma,
            computed,
            "inputs" if computed and not decision.compute else decision.why,
            weight=decision.weight,
            temporal=decision.temporal,
            spatial=decision.spatial,
            base_signal=decision.base_signal,
            expected_offset=decision.expected_offset,
            expected_error=decision.expected_error,
            tolerance=decision.tolerance,
            compute_fraction=min(self.cost / len(made), 1.0),
            calls=len(made),
            computed_calls=sum(self.made.values()),
        )
        self.trace.calls.append(self.record)
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

    def __init__(self) -> None:
        self.begun: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        """The timesteps that runs were begun with, by scheduler; weak references, both."""


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
        self.context, self._local = Context(), _OfThread()
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
        self._take(list(self.find_schedulers()))

    def uninstall(self) -> None:
        self.reset()
        _release([*self._schedulers, *self._copies], self.step)
        self._schedulers = []
        for stack in self._stacks.values():
            stack.uninstall()
        for module in self.denoisers.values():
            release(module)

    def _take(self, schedulers: list[Any]) -> None:
        """Take over schedulers that came since, or that another cache had; let go of others."""
        gone = [x for x in self._schedulers if not any(x is other for other in schedulers)]
        _release(gone, self.step)
        for scheduler in schedulers:
            if handler_of(scheduler) != self.step:
                check_scheduler(scheduler)
                intercept_step(scheduler, self.step)
        self._schedulers = schedulers

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
        run = self.latest or Run(new_trace(self._site.method))
        return summary_of(run.trace, run.peak_bytes)

    def _begin(self, schedulers: Iterable[Any]) -> None:
        """Begin a run of the schedulers, which were set to new timesteps."""
        self.reset()
        check_alone(self.denoisers.values())
        self.latest = self._local.run = run = Run(new_trace(self._site.method))
        for scheduler in schedulers:
            self._local.begun[scheduler] = weakref.ref(scheduler.timesteps)
            run.tracks[id(scheduler)] = track_of(scheduler)

    # -- calls and steps -------------------------------------------------------------------------

    def call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call of a denoiser."""
        local, schedulers = self._local, list(self.find_schedulers())
        if schedulers != self._schedulers or any(
            vars(each).get(HANDLER) != self.step for each in schedulers
        ):
            self._take(schedulers)
        fresh = [  # set_timesteps makes new tensors for every run
            each
            for each in (*schedulers, *self._copies)
            if each.timesteps is not None
            and ((begun := local.begun.get(each)) is None or begun() is not each.timesteps)
        ]
        if fresh:
            self._begin(fresh)
        run, context = local.run, self.context.name or "default"
        if run is None or run.finished:
            return original(*args, **kwargs)
        if run.stepped:  # the next step begins
            run.last_made, run.made, run.decided = tuple(run.made), {}, {}
            run.stepped, run.decision, run.cost = False, None, 0.0
            for track in run.tracks.values():
                if track.last is None:  # others are stepped, and this one is not
                    track.upcoming = None
        key = (name, context, sum(each[:2] == (name, context) for each in run.made))
        run.made[key] = False
        try:
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
                track = run.tracks[id(stepper)] = track_of(stepper)
            arguments = dict(track.signature.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop("kwargs", {})
            place = getattr(stepper, "step_index", None)
            if place is None:  # before the first step, or of a sampler that does not count
                begins = track.last is None
                place = track.first_place(arguments["timestep"]) if begins else track.last + 1
            steps = track.places.steps
            if not 0 <= place < len(steps):
                return original(**arguments)
            result = self._site.answer_step(run, track, steps[place], original, arguments)
        except BaseException:
            self.reset()
            raise
        run.stepped, track.last = True, place
        track.upcoming = steps[place + 1] if place + 1 < len(steps) else None
        track.returned = result if isinstance(result, Tensor) else result[0]
        if not any(each.upcoming for each in run.tracks.values() if each.last is not None):
            run.account_memory()
            run.forget()
            warn_if_idle(run.trace)
        return result


def _release(schedulers: Iterable[Any], handler: Callable[..., Any]) -> None:
    """Give back those of the schedulers that ``handler`` still has."""
    for scheduler in schedulers:
        if handler_of(scheduler) == handler:
            release(scheduler)
