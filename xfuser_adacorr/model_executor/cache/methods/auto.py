"""Auto: AdaCorrection's own refresh rule, with no base method below it."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from xfuser_adacorr.model_executor.cache.messages import warn_once

from .base import Rule, Warmup
from .learned import bind_plans, cannot_follow, check_targets, learned_lane
from .options import (
    AUTO_TOLERANCE,
    Method,
    check_count,
    check_flag,
    check_number,
    check_tolerance,
    compute_target,
    error_rule,
    within_budget,
)

logger = logging.getLogger(__name__)

LEARNED_COMPUTE = 0.4
"""Share of the steps computed by a plan that is learned without a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Auto(Method):
    """Refresh where the expected error of the latents asks for it; knows nothing of the model.

    Raises `ValueError` or `TypeError` that names the option and what is accepted.
    """

    label: ClassVar[str] = "Auto"

    tolerance: float | None = None
    """Relative error of the latents tolerated between two refreshes, > 0; None: 0.004."""
    target_compute: float | None = None
    """Share of the steps to be computed, in (0, 1], in place of a tolerance."""
    target_speedup: float | None = None
    """The same as its inverse, >= 1: counted compute, not wall-clock time."""
    gamma: float = 1.0
    """gamma >= 0 in the weight w = clip(gamma * S, 0, 1); 0: never refresh for w."""
    lambda_: float = 1.0
    """lambda >= 0, weight of the spatial term in the offset score S."""
    warmup: int = 0
    """Steps at the start of a run that are always computed (the first one always is)."""
    num_steps: int | None = None
    """Sampling steps of a bare model; None: inferred from the timesteps."""

    target_psnr: float | None = None
    """In place of a tolerance: the cheapest budget of a learned plan with this mean PSNR in dB on
    the prompts that it was calibrated on; no promise for one picture."""
    use_plan: bool = True
    """With a target, and the other options at their defaults, follow the learned plan beside the
    pipeline or its model where it fits the run and was measured to be better than Auto's own rule;
    else, and where there is none, Auto's own rule."""
    plan: str | None = None
    """File of learned plans, in place of the one beside the model."""
    learn: int | None = None
    """Where no plan is found, or ``use_plan=False`` leaves it aside: compute so many generations in
    full, fit a plan to them, and follow it from then on, at the target's compute; without a target
    at 0.4."""
    bound: Any = field(default=None, repr=False, compare=False)
    """The `BoundPlans` of the pipeline."""

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_number("lambda_", self.lambda_, least=0)
        check_tolerance(self)
        check_targets(self)
        check_flag("use_plan", self.use_plan)
        if self.plan is not None and not isinstance(self.plan, str):
            raise TypeError(f"plan must be a path or None, got {self.plan!r}")
        if self.target_psnr is not None and self.tolerance is not None:
            raise ValueError("tolerance and target_psnr: give one of them")
        check_count("learn", self.learn, least=1, optional=True)
        if self.learn is not None and not self.needs_steps:
            if self.tolerance is not None or self.target_psnr is not None:
                raise ValueError("learn acts with target_compute or target_speedup")
            object.__setattr__(self, "target_compute", LEARNED_COMPUTE)
        for name in ("plan", "learn", "target_psnr"):
            stored = self.use_plan or name == "learn"
            if getattr(self, name) is not None and not (stored and self._can_follow_a_plan):
                raise ValueError(
                    f"{name} acts with a target and use_plan=True, and with gamma, lambda_ and "
                    "warmup at their defaults, which a learned plan does not have"
                )
        check_count("warmup", self.warmup, least=0)
        check_count("num_steps", self.num_steps, least=1, optional=True)

    @property
    def needs_steps(self) -> bool:
        return self.target_compute is not None or self.target_speedup is not None

    @property
    def _can_follow_a_plan(self) -> bool:
        """Whether there is a target, and no option that only Auto's own rule has."""
        targets = self.needs_steps or self.target_psnr is not None
        return targets and self.gamma == self.lambda_ == 1 and not self.warmup

    def bound_to_pipeline(self, pipe, models) -> "Auto":
        """With the plans read; those beside the model are passed over if they are another's."""
        if not (self.use_plan and self._can_follow_a_plan):
            return self
        try:
            return replace(self, bound=bind_plans(self.plan, pipe, models))
        except FileNotFoundError:
            if self.plan is not None or self.target_psnr is not None:
                raise
            return self
        except ValueError as error:
            if self.plan is not None or self.target_psnr is not None:
                raise
            warn_once(f"Auto decides by its own rule: {error}")
            return self

    def make_lane(self, places, begin, inside, stepper, scope):
        def own_lane(reason: Any):
            if self.target_psnr is not None:
                raise ValueError(f"target_psnr needs a learned plan that fits the run; {reason}")
            _own_rule(reason)
            return Method.make_lane(self, places, begin, inside, stepper, scope)

        def checked(lane, step, arguments):
            unfit = cannot_follow(step, arguments)
            return lane if unfit is None else own_lane(f"plan: {unfit}")

        if self.bound is None:
            return Method.make_lane(self, places, begin, inside, stepper, scope)
        try:
            plan = self.bound.plan_for(places, begin, stepper)
            course = plan.course_for(compute_target(self), self.target_psnr)
        except ValueError as error:
            return own_lane(error)
        if course.loses_to_the_rule and self.target_psnr is None:
            return own_lane(
                f"plan: where it was measured it has {course.psnr_db:.1f} dB at "
                f"{len(course.steps)} steps, and this rule {course.rule_psnr_db:.1f}"
            )
        lane = learned_lane(plan, course, places)
        lane.checked = checked
        return lane

    def make_rule(self, places, inside) -> Rule:
        if self.target_psnr is not None:
            raise ValueError("target_psnr needs a learned plan, and a scheduler that it fits")
        own = error_rule(self, AUTO_TOLERANCE, places)
        rule = within_budget(own, own)
        return Warmup(rule, self.warmup) if self.warmup else rule


def _own_rule(reason: Any) -> None:
    logger.info("Auto decides by its own rule: %s", reason)
