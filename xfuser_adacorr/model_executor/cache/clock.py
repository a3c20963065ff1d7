"""Where in the sampling schedule a call stands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .samplers import RAW_OUTPUT, NoiseSchedule, read_schedule, unwrapped


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
    coordinate: float | None = None
    """Place on the axis of the forecast's line; None becomes ``sigma``, as for flow matching."""
    followed: float | None = None
    """How far the sampler follows the output, in units of the latents' scale; None becomes
    ``|sigma_next - sigma|``, as for flow matching."""

    velocity: tuple[float, float] = RAW_OUTPUT
    """Weights of output and latents in what forecasts are lines of."""

    def __post_init__(self) -> None:
        if self.coordinate is None:
            object.__setattr__(self, "coordinate", self.sigma)
        if self.followed is None:
            object.__setattr__(self, "followed", abs(self.sigma_next - self.sigma))


class SchedulerClock:
    """Reads the place from the pipeline's scheduler.

    Schedulers that count their steps are read without touching the device during a run; for the
    others (DDIM, PNDM) the timestep of the call, read with the decision, is looked up.
    """

    knows_latents = True
    """Whether the transformer is called with the latents here, not with another stage's output."""

    def __init__(self, get_stepper: Callable[[], Any]) -> None:
        self._get_stepper = get_stepper
        self._timesteps = None
        self._timestep_scale = 1.0
        self.schedule: NoiseSchedule | None = None
        """Of the running generation."""

    @property
    def stepper(self) -> Any:
        """What the pipeline steps with: its scheduler, or xfuser's wrapper of it."""
        return self._get_stepper()

    @property
    def scheduler(self) -> Any:
        return unwrapped(self.stepper)

    @property
    def needs_timestep(self) -> bool:
        return self.schedule is not None and self.schedule.timesteps is not None

    def run_began(self) -> bool:
        """True once for every ``set_timesteps``: it makes new tensors for each generation."""
        scheduler = self.scheduler
        if scheduler.timesteps is self._timesteps:
            return False
        self._timesteps = scheduler.timesteps
        self.schedule = read_schedule(scheduler, self.knows_latents)
        return True

    def locate(self, calls: int, timestep: float | None, last: Step | None) -> Step:
        return self._at(self._counted() if timestep is None else self._looked_up(timestep, last))

    def _at(self, index: int) -> Step:
        schedule, total = self.schedule, len(self._timesteps)
        if index >= total:
            raise RuntimeError(
                f"the scheduler has finished its {total} steps; call set_timesteps before "
                "calling the transformer again, or enable the cache on the transformer alone"
            )
        return Step(
            index,
            schedule.sigmas[index],
            schedule.sigmas[index + 1],
            total - index,
            coordinate=schedule.coordinates[index],
            followed=schedule.followed[index],
            velocity=schedule.velocities[index],
        )

    def _counted(self) -> int:
        index = self.scheduler.step_index
        return (self.scheduler.begin_index or 0) if index is None else index

    def _looked_up(self, timestep: float, last: Step | None) -> int:
        """Index of the nearest timestep; of equal ones (PNDM) the first after the last call."""
        timesteps = self.schedule.timesteps
        if last is None:  # some transformers are given the timestep, others its fraction
            whole = float(self.scheduler.config.num_train_timesteps)
            self._timestep_scale = min(
                (1.0, whole), key=lambda scale: min(abs(timestep * scale - t) for t in timesteps)
            )
        distances = [abs(timestep * self._timestep_scale - t) for t in timesteps]
        nearest = [i for i, distance in enumerate(distances) if distance == min(distances)]
        return next((i for i in nearest if last is None or i > last.index), nearest[0])

    def continues(self, last: Step, step: Step) -> bool:
        return step.index > last.index


class TimestepClock:
    """Infers the place from the timesteps a bare transformer is called with.

    The next sigma is guessed from the last step. With ``num_steps`` the end is known, without it
    the last calls are those from which the guessed steps reach sigma 0.
    """

    needs_timestep = True
    scheduler = None
    schedule = None

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
