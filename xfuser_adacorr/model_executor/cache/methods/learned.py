"""Learned: the computed steps and what stands in for the others, from a plan fitted beforehand.

Between two refreshes the latents are moved in a straight line, in flow coordinates, to where the
plan's coefficients say: ``y + sum_m b_m u_m`` over the velocities ``u_m`` computed so far. The plan
is fitted by `calibrate_learned` on the trajectories that it leads to itself.
"""

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from xfuser_adacorr.model_executor.cache.step import Step

from .base import Call, Decision, Read, Rule
from .options import Method, check_flag, check_number, compute_target

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.calibration.plan_file import Course, Plan, PlanFile
    from xfuser_adacorr.model_executor.cache.engine import Lane
    from xfuser_adacorr.model_executor.cache.schedulers import Places

logger = logging.getLogger(__name__)

DEFAULT_COMPUTE = 0.35
NOISE_ARGUMENTS = ("eta", "s_churn")
"""Arguments of ``step`` that make it draw noise if they are above 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned(Method):
    """Compute a plan's steps, and move the latents by its coefficients.

    Raises `FileNotFoundError` when enabled if there is no plan, and `ValueError` for another
    model's, and on the first call for a run that it was not fitted on.
    """

    label: ClassVar[str] = "Learned"

    target_compute: float | None = None
    """Share of the steps to be computed, in (0, 1]: the plan's nearest budget; None with no other
    target: 0.35."""
    target_speedup: float | None = None
    """The same as its inverse, >= 1: counted compute, not wall-clock time."""
    target_psnr: float | None = None
    """The cheapest budget with this mean PSNR in dB on the calibration prompts; no promise for one
    picture."""
    plan: str | None = None
    """File of plans; None: ``plan.json`` beside the pipeline or its model."""
    interpolate: bool = False
    """Carry a plan over to other steps than it was fitted on; its PSNR is then not known."""
    bound: Any = field(default=None, repr=False, compare=False)
    """The `BoundPlans` of the pipeline."""

    def __post_init__(self) -> None:
        check_targets(self)
        check_flag("interpolate", self.interpolate)
        if self.plan is not None and not isinstance(self.plan, str):
            raise TypeError(f"plan must be a path or None, got {self.plan!r}")

    @property
    def needs_steps(self) -> bool:
        return True

    def bound_to_pipeline(self, pipe: Any, models: Mapping[str, Any]) -> "Learned":
        return replace(self, bound=bind_plans(self.plan, pipe, models))

    def make_lane(self, places, begin, inside, stepper, scope) -> "Lane":
        plan = self.bound.plan_for(places, begin, stepper, self.interpolate)
        target = compute_target(self)
        if target is None and self.target_psnr is None:
            target = DEFAULT_COMPUTE
        if self.target_psnr is not None and plan.interpolated:
            raise ValueError("target_psnr: an interpolated plan has no PSNR that was measured")
        return learned_lane(plan, plan.course_for(target, self.target_psnr), places)

    def make_rule(self, places, inside) -> Rule:
        raise ValueError("Learned needs a scheduler: enable it on a pipeline, or give one")


def check_targets(options: Any) -> None:
    """Check ``target_compute``, ``target_speedup`` and ``target_psnr``, of which one is given."""
    check_number("target_compute", options.target_compute, above=0, most=1, optional=True)
    check_number("target_speedup", options.target_speedup, least=1, optional=True)
    check_number("target_psnr", options.target_psnr, above=0, optional=True)
    names = ("target_compute", "target_speedup", "target_psnr")
    given = [name for name in names if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them, each chooses the budget")


# -- which plan ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BoundPlans:
    """A model's plans, and the pipeline that is asked for its guidance scale."""

    file: "PlanFile"
    pipe: weakref.ref

    def plan_for(
        self, places: "Places", begin: int, stepper: Any, interpolate: bool = False
    ) -> "Plan":
        """The plan of a run whose first step is ``begin``; `ValueError` where none fits."""
        unfit = unlearnable(stepper, places)
        if unfit is not None:
            raise ValueError(f"plan: {unfit}")
        if begin != 0:
            raise ValueError(f"plan: the run begins at step {begin}, and the plan's at step 0")
        return self.file.plan_for(places, told_guidance(self.pipe()), interpolate)


def unlearnable(stepper: Any, places: "Places") -> str | None:
    """Why no plan can be fitted on this sampler; None if one can."""
    from xfuser_adacorr.model_executor.cache.schedulers import REPAIRED, repair_of, unwrapped

    scheduler = unwrapped(stepper)
    if repair_of(scheduler) == "none" or any(step.follows for step in places.steps):
        return (
            f"{type(scheduler).__name__} draws noise, or calls the model more than once a step; "
            f"plans are for {', '.join(REPAIRED)} without added noise"
        )
    return None


def told_guidance(pipe: Any) -> float | None:
    """The guidance scale of the run that a pipeline is at; None where it does not tell."""
    told = vars(pipe).get("_guidance_scale") if pipe is not None else None
    return float(told) if isinstance(told, (int, float)) else None


def bind_plans(given: str | None, pipe: Any, models: Mapping[str, Any]) -> BoundPlans:
    """Read the plans given, or those beside the pipeline.

    Raises `FileNotFoundError` where there are none, `ValueError` if they are another model's.
    """
    from xfuser_adacorr.model_executor.cache.calibration.plan_file import (
        PLAN_FILE,
        PlanFile,
        plan_beside,
    )

    path = given or plan_beside(pipe, models)
    if path is None:
        raise FileNotFoundError(
            f"plan: none is given, and there is no {PLAN_FILE} beside the pipeline or its model; "
            "make one with calibrate_learned"
        )
    file = PlanFile.load(path)
    file.check_models(models)
    return BoundPlans(file, weakref.ref(pipe))


def save_plans(x: Any, path: str | Path) -> Path:
    """Write the plans that a pipeline's cache follows, those it has learned itself among them.

    As ``plan.json`` in the pipeline's directory, or given as ``plan``, they are followed from the
    first generation on. Returns the path. Raises `ValueError` if there is no cache, or it has no
    plan (yet).
    """
    from xfuser_adacorr.model_executor.cache.api import site_of

    bound = getattr(site_of(x).method, "bound", None)
    if bound is None:
        raise ValueError("the cache has no learned plan to save (yet)")
    bound.file.save(path)
    return Path(path)


# -- one run -------------------------------------------------------------------------------------


def learned_lane(plan: "Plan", course: "Course", places: "Places") -> "Lane":
    """A run along a plan's course: its rule, and the repair that moves the latents."""
    lane = course_lane(course.steps, course.coefficients, places)
    name = plan.name + (" (interpolated)" if plan.interpolated else "")
    lane.rule.plan = {"plan": name, "expected_psnr_db": course.psnr_db}
    return lane


def course_lane(
    steps: Sequence[int], coefficients: Sequence[Sequence[float]], places: "Places"
) -> "Lane":
    """A run that computes ``steps``, and moves from each to the next by a row of coefficients."""
    from xfuser_adacorr.model_executor.cache.adacorrection.straight_line import StraightLine
    from xfuser_adacorr.model_executor.cache.engine import Lane
    from xfuser_adacorr.model_executor.cache.flow_coordinates import direction, flow_points
    from xfuser_adacorr.model_executor.cache.forecasts import LastValue

    line = StraightLine(flow_points(places), steps, direction(places), StoredMoves(coefficients))
    return Lane(OnCourse(steps), LastValue(), line, checked_first)


def checked_first(lane: "Lane", step: Step, arguments: Mapping[str, Any]) -> "Lane":
    """``lane`` at its first step; `ValueError` for a run that a plan cannot be followed in."""
    unfit = cannot_follow(step, arguments)
    if unfit is not None:
        raise ValueError(f"plan: {unfit}")
    return lane


def cannot_follow(step: Step, arguments: Mapping[str, Any]) -> str | None:
    """What about the first step keeps a run from following a plan; None if nothing does."""
    if step.index != 0:
        return f"the run begins at step {step.index}, and the plan's at step 0"
    if any(arguments.get(name) for name in NOISE_ARGUMENTS):
        return "the sampler adds noise in each step"
    if arguments.get("per_token_timesteps") is not None:
        return "each token is stepped by a timestep of its own"
    output, sample = arguments.get("model_output"), arguments["sample"]
    if output is None or output.shape != sample.shape:
        return "what the sampler is given is not as large as the latents"
    return None


class OnCourse(Rule):
    """Compute the listed steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def decide(self, call: Call, read: Read) -> Decision:
        if call.step.index == 0:
            return Decision(True, "first")
        listed = call.step.index in self.steps
        return Decision(listed, "plan" if listed else "reuse")


class StoredMoves:
    """The way from a refresh to the next one, by stored coefficients."""

    def __init__(self, coefficients: Sequence[Sequence[float]]) -> None:
        self.coefficients = coefficients
        self.velocities: list[Tensor] = []

    def __call__(self, k: int, y: Tensor, velocity: Tensor) -> Tensor:
        """``sum_m b_km u_m`` with the velocity computed at the ``k``-th refresh, at ``y``."""
        from xfuser_adacorr.model_executor.cache.calibration.learned_fit import combined

        self.velocities.append(velocity)
        return combined(self.velocities, self.coefficients[k])

    def tensors(self) -> list[Tensor]:
        return self.velocities
