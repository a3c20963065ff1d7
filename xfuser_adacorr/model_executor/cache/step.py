"""Where in the sampling schedule a step stands."""

from dataclasses import dataclass

RAW_OUTPUT = (1.0, 0.0)
"""`Step.velocity` of models that predict flow matching's velocity, or where it is not known."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step's place in a run, all of it on the host."""

    index: int
    """0-based, in sampling order."""
    sigma: float
    """Flow matching: sigma; else the deviation of the noise in latents of unit variance."""
    sigma_next: float
    """Noise level that the sampler steps to; a guess unless ``exact``."""
    remaining: int
    """Steps left, this one included."""
    exact: bool = True
    """False where the place was inferred from the timesteps that a bare model is called with."""
    coordinate: float | None = None
    """Place on the axis of the forecast's line; None becomes ``sigma``, as for flow matching."""
    step_gain: float | None = None
    """How far the sampler follows the output, in units of the latents' scale; None becomes
    ``|sigma_next - sigma|``, as for flow matching."""
    velocity: tuple[float, float] = RAW_OUTPUT
    """Weights ``(p, q)``: ``p * output + q * scale * latents`` is flow matching's velocity,
    noise - picture, of which forecasts are lines."""
    scale: float = 1.0
    """What the latents are multiplied by for the model."""
    mass: float = 1.0
    """``a + s`` where the scaled latents are ``a * picture + s * noise``."""
    timestep: float | None = None
    """As the scheduler has it."""
    follows: bool = False
    """The sampler calls the model again within a step (Heun): the decision is the call's before."""

    def __post_init__(self) -> None:
        if self.coordinate is None:
            object.__setattr__(self, "coordinate", self.sigma)
        if self.step_gain is None:
            object.__setattr__(self, "step_gain", abs(self.sigma_next - self.sigma))

    @property
    def is_last(self) -> bool:
        return self.remaining <= 1


def step_from_timestep(
    calls: int, timestep: float, last: Step | None, num_steps: int | None
) -> Step:
    """The place of a bare model's call, from ``timestep`` (1 at pure noise) and the call before.

    The next sigma is guessed from the last step. With ``num_steps`` the end is known, without it
    the last calls are those from which the guessed steps reach sigma 0.
    """
    step_size = 0.0 if last is None else timestep - last.sigma
    if num_steps is not None:
        remaining = num_steps - calls
    else:
        remaining = round(timestep / -step_size) if step_size < 0.0 else 2
    return Step(calls, timestep, timestep + step_size, max(remaining, 1), exact=False)
