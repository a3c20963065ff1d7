"""Pipeline calls that run side by side and wait for one another, one of them at a time."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.methods.options import Method
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.schedulers import (
    Places,
    describe_sampler,
    unwrapped,
)
from xfuser_adacorr.model_executor.cache.sites.sampler import SamplerSite
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import Trace


class Finished(Exception):
    """The last step was taken: what the pipeline would do next is not needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directed(Method):
    """A method whose lane a calibration makes: ``(index of the call, places, stepper) -> Lane``."""

    label: ClassVar[str] = "Learned"

    directed: Callable[[Places, Any, DecisionScope], Lane] = field(repr=False)

    def make_lane(self, places, begin, inside, stepper, scope) -> Lane:
        if begin != 0:
            raise ValueError(f"calibration: runs must begin at step 0, this one does at {begin}")
        return self.directed(places, stepper, scope)

    def to_dict(self) -> dict[str, Any]:
        return {}


class UntilTheEnd:
    """A lane's repair, after whose last step the call is over; ``ended(latents)`` is told."""

    def __init__(self, repair: Any, ended: Callable[[Any], None]) -> None:
        self.repair, self.ended = repair, ended

    def refresh(self, original, arguments, step: Step, fresh, forecast) -> Any:
        return self._ending(step, self.repair.refresh(original, arguments, step, fresh, forecast))

    def skip(self, original, arguments, step: Step) -> Any:
        return self._ending(step, self.repair.skip(original, arguments, step))

    def _ending(self, step: Step, result: Any) -> Any:
        if step.is_last:
            self.ended(result)
            raise Finished
        return result

    def tensors(self) -> list:
        return self.repair.tensors()


class Abandoned(Exception):
    """Another call has failed."""


class Turns:
    """Threads that run one at a time, each until it waits for all others, always in one order.

    Ranks that share samples compute the same call at the same time, or their messages would cross.
    """

    def __init__(self, count: int) -> None:
        self._count, self._turn, self._left, self._abandoned = count, 0, False, False
        self._changed = threading.Condition()

    def wait(self, index: int) -> None:
        """Until it is this one's turn; `Abandoned` if another one failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or self._turn == index)
            if self._abandoned:
                raise Abandoned

    def pass_on(self, index: int) -> None:
        """This one waits: the next one's turn."""
        with self._changed:
            if self._left:
                raise RuntimeError("calls that meet must all take the same steps")
            self._turn = (index + 1) % self._count
            self._changed.notify_all()

    def leave(self, index: int) -> None:
        """This one is done, and so are the others once they had their turn."""
        with self._changed:
            self._left, self._turn = True, index + 1
            self._changed.notify_all()

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class SideBySide:
    """Calls of copies of one pipeline that share its models, each with schedulers of its own.

    ``calls`` hold the arguments of each. Inside of `run`, `index` tells which call asks, and `meet`
    waits for all others.
    """

    def __init__(
        self, pipe: Any, models: Mapping[str, nn.Module], calls: Sequence[Mapping[str, Any]]
    ) -> None:
        self.models, self.calls = models, calls
        self.pipes = [_copied(pipe) for _ in calls]
        self._local = threading.local()
        self._turns: Turns | None = None

    @property
    def index(self) -> int:
        return self._local.index

    def run(
        self,
        directed: Callable[[Places, Any, DecisionScope], Lane],
        *,
        meeting: bool = False,
        finished: Callable[[int], None] = lambda index: None,
    ) -> tuple[list[Any], list[Trace]]:
        """Run every call with the lanes ``directed`` makes: their outputs (None of those that
        `Finished`) and, unless they meet, what was decided in each.

        Without ``meeting`` they run one after the other. ``finished(index)`` is told of each.
        """
        if not self.calls:
            return [], []
        outputs: list[Any] = [None] * len(self.calls)
        traces: list[Any] = [None] * len(self.calls)
        with self._site(directed) as site:

            def work(index: int) -> None:
                self._local.index = index
                pipe = self.pipes[index]
                try:
                    with torch.no_grad():
                        outputs[index] = pipe(**_arguments(self.calls[index]))
                except Finished:
                    if hasattr(pipe, "maybe_free_model_hooks"):
                        pipe.maybe_free_model_hooks()
                traces[index] = None if meeting else site.tracker.latest.trace
                finished(index)

            if meeting and len(self.calls) > 1:
                self._in_threads(work)
            else:
                for index in range(len(self.calls)):
                    work(index)
        return outputs, traces

    def _in_threads(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []
        self._turns = turns = Turns(len(self.calls))
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def by_turns(index: int) -> None:
            if device is not None:
                torch.cuda.set_device(device)
            try:
                turns.wait(index)
                work(index)
                turns.leave(index)
            except Abandoned:  # another one failed
                pass
            except BaseException as error:
                errors.append(error)
                turns.abandon()

        threads = [
            threading.Thread(target=by_turns, args=(index,), daemon=True)
            for index in range(len(self.calls))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def meet(self, when_all_are_here: Callable[[], None]) -> None:
        """Wait for all calls to come here; the last of them calls ``when_all_are_here``."""
        if self.index == len(self.calls) - 1:
            when_all_are_here()
        if len(self.calls) > 1:
            self._turns.pass_on(self.index)
            self._turns.wait(self.index)

    @contextmanager
    def _site(self, directed: Callable):
        site = SamplerSite(
            Directed(directed=directed), self.models, self._schedulers, DecisionScope(), {}
        )
        self._local.index = 0
        site.install()
        try:
            yield site
        finally:
            site.uninstall()

    def samplers(self) -> list[dict[str, Any]]:
        """Class and options of each scheduler."""
        return [describe_sampler(unwrapped(each)) for each in self._schedulers()]

    def _schedulers(self) -> list[Any]:
        """Of the call that asks."""
        pipe = self.pipes[getattr(self._local, "index", 0)]
        owners = [vars(each) for each in (pipe, _wrapped(pipe)) if each is not None]
        return [v for values in owners for name, v in values.items() if _is_scheduler(name, v)]


def _wrapped(pipe: Any) -> Any:
    """The pipeline inside of xfuser's."""
    return vars(pipe).get("module")


def _is_scheduler(name: str, value: Any) -> bool:
    return name.endswith("scheduler") and hasattr(value, "step") and hasattr(value, "timesteps")


def _copied(pipe: Any) -> Any:
    """A pipeline around the same models, silent, with schedulers of its own."""
    values = dict(vars(pipe))
    for name, value in values.items():
        if _is_scheduler(name, value):
            values[name] = _scheduler_copied(value)
    values["_progress_bar_config"] = {"disable": True}
    if _wrapped(pipe) is not None:
        values["module"] = _copied(_wrapped(pipe))
    return _alike(pipe, values)


def _scheduler_copied(scheduler: Any) -> Any:
    inside = unwrapped(scheduler)
    if inside is scheduler:
        return copy.deepcopy(scheduler)
    return _alike(scheduler, {**vars(scheduler), "module": copy.deepcopy(inside)})


def _alike(x: Any, values: Mapping[str, Any]) -> Any:
    """Another of its class; xfuser's wrappers cannot be copied by `copy`."""
    own = object.__new__(type(x))
    own.__dict__.update(values)
    return own


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """With generators made from the seeds, so that every run draws the same noise."""
    arguments = dict(call)
    if "noise" in arguments:
        return arguments | arguments.pop("noise")()
    seeds = arguments.pop("seeds")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments["generator"] = generators[0] if len(generators) == 1 else generators
    return arguments
