"""Where in the sampling schedule a call stands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One call's place in the schedule."""

    index: int
    """0-based, in sampling order."""
    sigma: float
    sigma_next: float
    """Noise level that the sampler steps to; a guess unless ``exact``."""
    remaining: int
    """Calls of this branch left, this one included."""
    exact: bool = True


class SchedulerClock:
    """Reads the place from the pipeline's scheduler, without touching the device during a run."""

    needs_timestep = False

    def __init__(self, get_scheduler: Callable[[], Any]) -> None:
        self._get_scheduler = get_scheduler
        self._timesteps = None
        self._sigmas: list[float] = []

    @property
    def scheduler(self) -> Any:
        return self._get_scheduler()

    def run_began(self) -> bool:
        """True once for every ``set_timesteps``: it makes new tensors for each generation."""
        scheduler = self.scheduler
        if scheduler.timesteps is self._timesteps:
            return False
        self._timesteps = scheduler.timesteps
        self._sigmas = scheduler.sigmas.tolist()
        return True

    def locate(self, calls: int, timestep: float | None, last: Step | None) -> Step:
        scheduler = self.scheduler
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index or 0
        total = len(self._timesteps)
        if index >= total:
            raise RuntimeError(
                f"the scheduler has finished its {total} steps; call set_timesteps before "
                "calling the transformer again, or enable the cache on the transformer alone"
            )
        return Step(index, self._sigmas[index], self._sigmas[index + 1], total - index)

    def continues(self, last: Step, step: Step) -> bool:
        return step.index > last.index


class TimestepClock:
    """Infers the place from the timesteps a bare transformer is called with.

    The next sigma is guessed from the last step. With ``num_steps`` the end is known, without it
    the last calls are those from which the guessed steps reach sigma 0.
    """

    needs_timestep = True
    scheduler = None

    def __init__(self, num_steps: int | None) -> None:
        self._num_steps = num_steps

    def run_began(self) -> bool:
        return False

    def locate(self, calls: int, timestep: float | None, last: Step | None) -> Step:
        step_size = 0.0 if last is None else timestep - last.sigma
        if self._num_steps is not None:
            remaining = self._num_steps - calls
        else:
            remaining = round(timestep / -step_size) if step_size < 0.0 else 2
            remaining = max(remaining, 1)
        return Step(calls, timestep, timestep + step_size, remaining, exact=False)

    def continues(self, last: Step, step: Step) -> bool:
        """False where the noise level did not fall, or the counted steps are over."""
        wrapped = self._num_steps is not None and step.index >= self._num_steps
        return step.sigma < last.sigma and not wrapped
