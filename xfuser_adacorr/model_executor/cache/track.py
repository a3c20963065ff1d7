"""One sampler of a run, and where it stands."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .engine import Lane
from .schedulers import Places, read_places, unwrapped
from .step import Step


@dataclass(slots=True)
class Track:
    """One sampler of a run: where it stands, and what its steps are cached with."""

    stepper: Any
    timesteps: Tensor
    """The run's: another object is another run."""
    places: Places
    signature: inspect.Signature
    """Of the sampler's ``step``."""
    begin: int
    """Which of ``places.steps`` the run begins with, as far as that is known before it."""
    upcoming: Step | None
    """The step to come; None beyond the last one, and of samplers that are never stepped."""
    output: str = "model_output"
    """The argument of ``step`` that the sampler follows: the picture, where it is given (EDM)."""
    lane: Lane | None = None
    last: int | None = None
    """Which of ``places.steps`` was taken last."""
    returned: Tensor | None = None
    """Latents that the last step returned."""

    def guess_begin(self, fraction: float) -> None:
        """Guess the run's first step: it is at this fraction of the timestep at pure noise."""
        length = getattr(self.stepper.config, "num_train_timesteps", None)
        if length is not None:
            self.begin = self.places.nearest(fraction * length)
            self.upcoming = self.places.steps[self.begin]

    def first_place(self, timestep: Any) -> int:
        """Which of ``places.steps`` the run's first step, at ``timestep``, is."""
        begin = getattr(self.stepper, "begin_index", None)
        if begin is not None:
            return begin
        return self.places.nearest(float(torch.as_tensor(timestep).flatten()[0]))


def track_of(stepper: Any) -> Track:
    """Of a scheduler, or of xfuser's wrapper of one, that was set to a run's timesteps."""
    scheduler = unwrapped(stepper)
    signature = inspect.signature(partial(type(stepper).step, stepper))  # an own one may be others'
    places, begin = read_places(scheduler), getattr(stepper, "begin_index", None) or 0
    upcoming = places.steps[begin] if begin < len(places.steps) else None
    return Track(stepper, scheduler.timesteps, places, signature, begin, upcoming)
