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
        self._turn = threading.Lock()
        self._all_here: threading.Barrier | None = None
        self._meeting: Callable[[], None] = lambda: None

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
                self._all_here = threading.Barrier(1, action=self._act) if meeting else None
                for index in range(len(self.calls)):
                    work(index)
        return outputs, traces

    def _in_threads(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []
        self._all_here = threading.Barrier(len(self.calls), action=self._act)
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def taking_turns(index: int) -> None:
            if device is not None:
                torch.cuda.set_device(device)
            with self._turn:
                try:
                    work(index)
                except threading.BrokenBarrierError:  # another one failed
                    pass
                except BaseException as error:
                    errors.append(error)
                    self._all_here.abort()

        threads = [
            threading.Thread(target=taking_turns, args=(index,), daemon=True)
            for index in range(len(self.calls))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _act(self) -> None:
        self._meeting()

    def meet(self, when_all_are_here: Callable[[], None]) -> None:
        """Wait for all calls to come here; then one of them calls ``when_all_are_here``."""
        self._meeting = when_all_are_here
        threaded = self._turn.locked()
        if threaded:
            self._turn.release()
        try:
            self._all_here.wait()
        finally:
            if threaded:
                self._turn.acquire()

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
        values = vars(self.pipes[getattr(self._local, "index", 0)])
        return [values[name] for name in values if _is_scheduler(name, values[name])]


def _is_scheduler(name: str, value: Any) -> bool:
    return name.endswith("scheduler") and hasattr(value, "step") and hasattr(value, "timesteps")


def _copied(pipe: Any) -> Any:
    """A pipeline around the same models, silent, with schedulers of its own."""
    own = copy.copy(pipe)
    for name, value in list(vars(own).items()):
        if _is_scheduler(name, value):
            vars(own)[name] = copy.deepcopy(value)
    vars(own)["_progress_bar_config"] = {"disable": True}
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
