"""A sampler step's site that learns a plan from a pipeline's first generations."""

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator

from xfuser_adacorr.model_executor.cache.calibration.learned import (
    SHORT_SEARCH,
    STARTS,
    find_course,
)
from xfuser_adacorr.model_executor.cache.calibration.learned_runs import ClosedLoop
from xfuser_adacorr.model_executor.cache.calibration.plan_file import (
    Plan,
    PlanFile,
    fingerprints,
    package_versions,
)
from xfuser_adacorr.model_executor.cache.calibration.together import Together
from xfuser_adacorr.model_executor.cache.calibration.trajectories import Recorder, Trajectories
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.flow_coordinates import flow_points
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.intercept import InterceptedCall, intercept, release
from xfuser_adacorr.model_executor.cache.methods.learned import (
    BoundPlans,
    OnCourse,
    unlearnable,
)
from xfuser_adacorr.model_executor.cache.methods.options import compute_target
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .sampler import SamplerSite

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Generation:
    """A call of the pipeline, so that it can be made again, and its trajectory."""

    arguments: dict[str, Any]
    noise: Callable[[], dict[str, Any]]
    """Sets random numbers back, and returns the generators."""
    places: Places | None = None
    trajectory: Trajectories | None = None


class LearningSite(SamplerSite):
    """Computes the first ``method.learn`` generations in full, fits a plan to them, and follows it.

    Generations that are not like the first one (steps, size) are left to the method's own rule and
    do not count. The fit runs at the end of the last of them: several cached generations of each.
    Schedules are searched from `LEAST_SPLIT` generations on, where some can be left out of the fits
    that are compared; fewer choose among the `STARTS`.
    Later generations on other steps are learned from anew; what was learned before is kept. Ranks
    that share the samples fit the same numbers; data-parallel replicas learn each for itself.
    """

    def __init__(self, method: Any, denoisers, find_schedulers, scope, stacks, pipe: Any) -> None:
        super().__init__(method, denoisers, find_schedulers, scope, stacks)
        self._pipe = weakref.ref(pipe)
        self._denoisers = denoisers
        self._together = Together(scope)
        self._learned: list[Generation] = []
        self._now: Generation | None = None
        """The generation that runs, if it is learned from."""

    def install(self) -> None:
        super().install()
        if self.method.learn is not None:
            intercept(self._pipe(), self._generate, None, InterceptedCall)

    def uninstall(self) -> None:
        if self.method.learn is not None:
            release(self._pipe())
        super().uninstall()

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the pipeline."""
        names = list(inspect.signature(original).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self._now = Generation(arguments, _noise_of(arguments))
        try:
            output = original(*args, **kwargs)
            done = self._now
        finally:
            self._now = None
        if done.trajectory is not None and self._is_alike(done):
            with self._together.alike():
                done.trajectory.check()
            self._learned.append(done)
            logger.info("learned from %d of %d generations", len(self._learned), self.method.learn)
            if len(self._learned) == self.method.learn:
                self._fit()
        return output

    def _is_alike(self, generation: Generation) -> bool:
        if not self._learned:
            return True
        first, shape = self._learned[0].trajectory, generation.trajectory.shape(0)
        return shape[2] == first.shape(0)[2]

    def _new_lane(self, run, track) -> Lane:
        learns = self._now is not None and self._now.places is None and len(run.tracks) == 1
        if learns:
            track.lane = self._recording_lane(track.places, track.begin, track.stepper)
        return track.lane or super()._new_lane(run, track)

    def _recording_lane(self, places: Places, begin: int, stepper: Any) -> Lane | None:
        """A lane that computes and notes everything; None for a run that is not learned from."""
        first = self._learned[0].places if self._learned else places
        alike = places.sampler == first.sampler and places.coordinates == first.coordinates
        known = self.method.bound.file.plans if self.method.bound is not None else ()
        if any(plan.misfit(places) is None for plan in known):
            return None
        if begin != 0 or not alike or unlearnable(stepper, places) is not None:
            return None
        steps = len(places.steps)
        self._now.places, self._now.trajectory = places, Trajectories(steps)
        recorder = Recorder(self._now.trajectory, 0, flow_points(places))
        return Lane(OnCourse(range(steps)), LastValue(), recorder)

    def _fit(self) -> None:
        """Make the generations again along schedules, and follow what is fitted from now on."""
        generations, self._learned = self._learned, []
        pipe, first = self._pipe(), generations[0]
        self.uninstall()
        try:
            calls = [{**each.arguments, "noise": each.noise} for each in generations]
            loop = ClosedLoop(pipe, self._denoisers, calls, together=self._together)
            loop.take_over([each.trajectory for each in generations], first.places)
            steps = len(first.places.steps)
            count = min(max(round(compute_target(self.method) * steps), 1), steps - 1)
            searched = STARTS if loop.fitted is None else SHORT_SEARCH
            plan = Plan(
                name=f"learned from {len(generations)} generations",
                sampler=first.places.sampler,
                times=tuple(loop.times),
                guidance_scale=None,  # what is learned serves any, other than a stated PSNR
                courses=(find_course(loop, count, searched),),
                settings={"versions": package_versions()},
            )
            known = self.method.bound.file.plans if self.method.bound is not None else ()
            file = PlanFile(fingerprints=fingerprints(self._denoisers), plans=(*known, plan))
            self.method = replace(self.method, bound=BoundPlans(file, weakref.ref(pipe)))
        finally:
            self.install()


def _noise_of(arguments: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """What sets the random numbers back to where they are now."""
    given = arguments.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    states = [(each.device, each.get_state()) for each in generators]
    own = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def restored() -> dict[str, Any]:
        if not states:
            torch.set_rng_state(own)
            if on_device is not None:
                torch.cuda.set_rng_state_all(on_device)
            return {}
        made = [Generator(device) for device, _ in states]
        for generator, (_, state) in zip(made, states, strict=True):
            generator.set_state(state)
        return {"generator": made if isinstance(given, list) else made[0]}

    return restored
