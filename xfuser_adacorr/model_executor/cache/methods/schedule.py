"""Schedule: the computed steps are given, as a list, every N-th step, or found by a search."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser_adacorr.model_executor.cache.refreshes import checked_schedule, refreshed_steps
from xfuser_adacorr.model_executor.cache.step import Step

from .base import BlockCall, Call, Decision, Read, Rule, Signal, StackMethod, Streams
from .options import AdaCorrection, Literal, Method, check_choice, check_count, check_flag
from .residual import StackResidual

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.schedulers import Places

FORECASTS = ("residual", "last", "line")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(Method):
    """Compute exactly the listed steps, and step 0.

    Every N-th step is FORA's rule (arXiv 2407.01425): counted from the last step, which is
    computed. Raises `ValueError` on the first call for a schedule that does not fit the run.
    """

    label: ClassVar[str] = "Schedule"

    every: int | None = None
    """A computed step every N steps, counted from the last one."""
    steps: Sequence[int] | Sequence[bool] | None = None
    """The indices of the computed steps, or a mask of the run's length (kept as tuples)."""
    stored: str | None = None
    """File of a searched schedule; with ``every`` and ``steps`` None too: the one beside the
    model."""
    interpolate: bool = False
    """Place a stored schedule by noise level where the run's steps are others."""
    forecast: str | None = None
    """What stands in: the stack's ``residual`` (None), the ``last`` guided output, or the damped
    ``line`` through the last two."""
    num_steps: int | None = None
    """Sampling steps of a bare model."""
    correction: AdaCorrection | None = None
    """AdaCorrection(): the damped line stands in, and the skipped steps are repaired."""
    loaded: Any = field(default=None, repr=False, compare=False)
    """The `StoredSchedule` that was read."""

    def __post_init__(self) -> None:
        check_count("every", self.every, least=1, optional=True)
        check_count("num_steps", self.num_steps, least=1, optional=True)
        check_flag("schedule_interpolation", self.interpolate)
        if self.forecast is not None:
            check_choice("forecast", self.forecast, FORECASTS)
        if self.steps is not None:
            object.__setattr__(self, "steps", checked_schedule(self.steps))
        if self.every is not None and self.steps is not None:
            raise ValueError("every and steps: give one of them")
        if self.given is not None:
            for name, value in (("calibration", self.stored), ("interpolation", self.interpolate)):
                if value:
                    raise ValueError(f"{name} is for a stored schedule: give no schedule with it")
            if self.num_steps is not None:
                refreshed_steps(self.given, self.num_steps)  # raises before the first call
        if isinstance(self.correction, Literal):
            raise ValueError("adacorr_mode must be 'adaptive' for Schedule: the schedule decides")
        if self.correction is not None and self.correction != AdaCorrection():
            raise ValueError(
                "AdaCorrection must have its defaults for Schedule: the schedule alone decides; "
                f"got {self.correction}"
            )
        if self.correction is not None and self.forecast is not None:
            raise ValueError("stand_in must be None with AdaCorrection: its forecast stands in")

    @property
    def given(self) -> Any:
        """The schedule that was given; None: a stored one."""
        return self.every if self.every is not None else self.steps

    @property
    def needs_blocks(self) -> bool:
        return self.correction is None and self.forecast in (None, "residual")

    @property
    def answers_steps(self) -> bool:
        return not self.needs_blocks

    @property
    def needs_steps(self) -> bool:
        return True

    @property
    def stand_in(self) -> str:
        """What a stored schedule was searched for."""
        if self.correction is not None:
            return "adacorrection"
        return {None: "reuse", "residual": "reuse", "line": "forecast"}.get(
            self.forecast, self.forecast
        )

    def bound_to(self, model: Any) -> "Schedule":
        """With the stored schedule read, the given one or the one beside ``model``."""
        from xfuser_adacorr.model_executor.cache.calibration.stored_schedule import load_schedule

        if self.given is not None:
            return self
        return replace(self, loaded=load_schedule(model, self.stored, self.stand_in))

    def placed(self, places: "Places | None") -> "Schedule":
        """With a stored schedule's steps for this run."""
        if self.loaded is None:
            return self
        steps = self.loaded.steps_for(places, interpolate=self.interpolate)
        return replace(self, steps=steps, loaded=None, stored=None, interpolate=False)

    def make_rule(self, places, inside) -> "Listed":
        return Listed(self.placed(places))

    def make_stack(self, model, family) -> "ListedStack":
        return ListedStack(self, family.output_stream)

    def make_forecast(self, scope):
        from xfuser_adacorr.model_executor.cache.forecasts import DampedLine, LastValue

        return LastValue() if self.forecast == "last" else DampedLine(scope.summed)

    def make_repair(self, stepper):
        from xfuser_adacorr.model_executor.cache.adacorrection import NoRepair

        return NoRepair() if self.correction is None else Method.make_repair(self, stepper)

    def computes(self, step: Step) -> bool:
        """Whether ``step`` is listed; `ValueError` for a schedule that does not fit the run."""
        return step.index in refreshed_steps(self.given, step.index + step.remaining)


class Listed(Rule):
    """Compute the listed steps."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._begun = False

    def decide(self, call: Call, read: Read) -> Decision:
        listed = self.schedule.computes(call.step)
        if not self._begun:
            return Decision(True, "first")
        return Decision(listed, "base" if listed else "reuse")

    def after_call(self, call: Call, decision: Decision) -> None:
        self._begun = True


class ListedStack(StackMethod):
    """The same inside the model: the stack's last residual stands in."""

    forces_last = False

    def __init__(self, schedule: Schedule, stream: str) -> None:
        self.schedule, self.stream = schedule, stream
        self._placed = schedule

    def begin_run(self, places) -> None:
        self._placed = self.schedule.placed(places)

    def new_state(self) -> StackResidual:
        return StackResidual()

    def measure(self, state: StackResidual, call: BlockCall) -> Signal:
        return Signal()

    def decide(self, state: StackResidual, step: Step, read: Read) -> Decision:
        listed = self._placed.computes(step)
        return Decision(listed, "base" if listed else "reuse")

    def after_call(self, state: StackResidual, step: Step, decision: Decision) -> None:
        self._placed.computes(step)  # raises at the first call already

    def run_block(self, state: StackResidual, call: BlockCall, decision: Decision) -> Streams:
        return state.run_block(call, decision, self.stream, keep=True)
