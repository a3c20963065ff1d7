"""Schedule: the computed steps are given, as a list, every N-th step, or found by a search."""

from dataclasses import dataclass

from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.refreshes import refreshed_steps
from xfuser_adacorr.model_executor.cache.clock import SchedulerClock, Step, TimestepClock
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily
from xfuser_adacorr.model_executor.cache.stored_schedule import load_schedule, stand_in_of

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict
from .tea import Tea


@dataclass(slots=True)
class ScheduleState:
    step: Step | None = None
    """Place of the running call."""
    residual: Tensor | None = None
    """Stack output minus stack input of the last computed call ``[B, N, D]``."""
    stack_input: Tensor | None = None


class Schedule(BaseMethod):
    """Compute exactly the listed steps, and step 0.

    What stands in for the others: the residual of the whole stack (``h + R``, as `Tea`), with
    ``stand_in="forecast"`` the line through the last two computed outputs, or with AdaCorrection
    that line and compensation at the listed steps. Nothing is read; where outputs are split over
    ranks, lines add 8 bytes a computed call. Every N-th step is FORA's rule (arXiv 2407.01425):
    counted from the last step, which is computed.

    Raises `ValueError` for a stored schedule of another model or stand-in, and on the first call
    for a schedule that does not fit the run: its number of steps, or for a stored one its sampler
    or noise levels.
    """

    decides_alone = True
    forces_last = False

    def __init__(
        self, config: CacheConfig, family: ModelFamily, transformer: nn.Module, *, signal_only: bool
    ) -> None:
        self.family = family
        self.signal_only = signal_only or config.stand_in == "forecast"
        self.num_steps = config.num_steps
        self.schedule, self.stored = config.schedule, None
        self.interpolates = config.schedule_interpolation
        if self.schedule is None:
            self.stored = load_schedule(transformer, config.calibration, stand_in_of(config))
        elif self.num_steps is not None:
            refreshed_steps(self.schedule, self.num_steps)  # raises before the first call

    def new_state(self) -> ScheduleState:
        return ScheduleState()

    def begin_generation(self, clock: SchedulerClock | TimestepClock) -> None:
        if self.stored is not None:
            self.schedule = self.stored.steps_for(clock, interpolate=self.interpolates)

    def begin_call(self, state: ScheduleState, step: Step) -> None:
        if not step.exact and self.num_steps is None:
            raise ValueError(
                "num_steps must be given for Schedule on a transformer without its scheduler (or "
                "give the scheduler)"
            )
        refreshed_steps(self.schedule, step.index + step.remaining)
        state.step = step

    def probe(self, state: ScheduleState, call: BlockCall) -> Signal:
        return Signal()

    def verdict(self, state: ScheduleState, sums: list[float], local: list[float]) -> Verdict:
        step = state.step
        computed = refreshed_steps(self.schedule, step.index + step.remaining)
        return Verdict(step.index not in computed, None)

    def settle(self, state: ScheduleState, verdict: Verdict | None, refreshed: bool) -> None:
        pass

    def run_block(self, state: ScheduleState, call: BlockCall, verdict: Verdict | None) -> Streams:
        return Tea.run_block(self, state, call, verdict)
