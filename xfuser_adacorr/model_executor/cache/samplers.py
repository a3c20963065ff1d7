"""What is known about diffusers' samplers: their noise schedule, and how reuse can be mended."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

from xfuser_adacorr.core.schedule import (
    PREDICTIONS,
    followed,
    fractional_index,
    noise_angle,
    velocity_weights,
)

EULER = ("FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler")
"""Step ``x <- x + c * dsigma * output``: what skipped calls owe is paid in a later output."""
REPLAYED = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Deterministic, one call a step, and all of their state in attributes: they can be replayed."""
COMPENSATED = EULER + REPLAYED
STEP_ARGUMENTS = {"model_output", "timestep", "sample"}
"""What a replay has to find among the arguments of ``step``."""

RAW_OUTPUT = (1.0, 0.0)
"""`NoiseSchedule.velocities` of models that predict the velocity, or latents not known."""

VARIANCE_EXPLODING = ("EulerDiscreteScheduler", "LMSDiscreteScheduler")
"""Their latents are ``x0 + tan(phi) * noise``, which the pipeline scales for the model."""

Mending = Literal["output", "replay", "none"]


XFUSER_WRAPPER = "xFuserSchedulerBaseWrapper"


def unwrapped(scheduler: Any) -> Any:
    """The diffusers scheduler within xfuser's wrapper of it, or the scheduler itself."""
    wrapped = any(cls.__name__ == XFUSER_WRAPPER for cls in type(scheduler).__mro__)
    return scheduler.module if wrapped else scheduler


def is_known_as(scheduler: Any, names: Sequence[str]) -> bool:
    """Whether the scheduler is of one of the classes, or of a subclass."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def mending_of(scheduler: Any) -> Mending:
    """How steps made with reused outputs can be mended: not at all for stochastic samplers."""
    config = scheduler.config
    stochastic = getattr(config, "stochastic_sampling", False) or str(
        getattr(config, "algorithm_type", "")
    ).startswith("sde")
    # A nested predictor's state is not an attribute of the scheduler.
    nested = getattr(scheduler, "solver_p", None) is not None
    if stochastic or nested:
        return "none"
    if is_known_as(scheduler, EULER):
        return "output"
    named = STEP_ARGUMENTS <= signature(scheduler.step).parameters.keys()
    return "replay" if named and is_known_as(scheduler, REPLAYED) else "none"


SAMPLER_OPTIONS = (
    "algorithm_type",
    "disable_corrector",
    "euler_at_final",
    "lower_order_final",
    "predict_x0",
    "prediction_type",
    "set_alpha_to_one",
    "skip_prk_steps",
    "solver_order",
    "solver_type",
    "stochastic_sampling",
    "thresholding",
    "use_lu_lambdas",
)
"""Options that change what a step does, beside the noise levels."""


def describe_sampler(scheduler: Any) -> dict[str, Any]:
    """Class and options of a sampler, to tell whether another one steps alike."""
    config = scheduler.config
    options = {name: config[name] for name in SAMPLER_OPTIONS if name in config}
    return {"class": type(scheduler).__name__, **options}


def model_scale(scheduler: Any, sigma: float) -> float:
    """What the latents are multiplied by for the model, at a deviation ``sigma`` of the noise."""
    return math.sqrt(1.0 - sigma**2) if is_known_as(scheduler, VARIANCE_EXPLODING) else 1.0


def _is_flow(scheduler: Any) -> bool:
    """Flow matching: ``x = (1 - sigma) * x0 + sigma * noise``."""
    if getattr(scheduler.config, "use_flow_sigmas", False):
        return True
    preconditioned = "sigma_data" in scheduler.config  # EDM's sigmas have another meaning
    has_alphas = hasattr(scheduler, "alphas_cumprod")
    return hasattr(scheduler, "sigmas") and not has_alphas and not preconditioned


def check_sampler(scheduler: Any) -> None:
    """Raise `ValueError` for a scheduler that AdaCorrection cannot correct under."""
    name, config = type(scheduler).__name__, scheduler.config
    accepted = f"accepted: {', '.join(COMPENSATED)}, and stochastic ones without compensation"
    if getattr(scheduler, "order", 1) != 1 or not getattr(config, "skip_prk_steps", True):
        raise ValueError(
            f"scheduler must call the transformer once a step for AdaCorrection, {name} as "
            f"configured calls it more often; {accepted}"
        )
    prediction = getattr(config, "prediction_type", None)
    if _is_flow(scheduler):
        if prediction not in (None, "flow_prediction"):
            raise ValueError(
                f"scheduler: {name} with flow-matching sigmas must have prediction_type "
                f"'flow_prediction' for AdaCorrection, got {prediction!r}"
            )
    elif not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler must be of flow matching or have alphas_cumprod for AdaCorrection, "
            f"got {name}; {accepted}"
        )
    elif prediction not in PREDICTIONS:
        raise ValueError(
            f"scheduler: prediction_type of {name} must be one of {', '.join(PREDICTIONS)} for "
            f"AdaCorrection, got {prediction!r}"
        )


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """One run's schedule on the host, one entry a step (``sigmas`` one more)."""

    sigmas: list[float]
    """Flow matching: sigma; else the deviation of the noise, ``sqrt(1 - alpha_cumprod)``."""
    coordinates: list[float]
    """Where outputs are taken to change along a line: see `read_schedule`."""
    followed: list[float]
    """How far a step follows the output, in units of the latents' scale."""
    velocities: list[tuple[float, float]]
    """Weights of output and latents in what forecasts are lines of."""
    timesteps: list[float] | None
    """Known where the scheduler does not count its steps, so that calls are placed by value."""


def read_schedule(scheduler: Any, latents_known: bool = True) -> NoiseSchedule:
    """Read the schedule that ``set_timesteps`` made.

    Forecasts are lines of flow matching's velocity, noise - picture, whatever the model predicts:
    noise changes slowly at low noise levels and the predicted picture at high ones, the velocity at
    both. It takes the latents to convert to it; where they are not known, the lines are the
    output's own.

    The coordinate is sigma for flow matching and the fraction of the training timesteps for
    variance-preserving schedules: that is the axis the model was trained uniformly on, while the
    noise level ``tan(phi)`` spends most of its range (157 to 3 under DDPM's betas) on the first
    third of it. It is found from the noise level, not from the timesteps given to the model, since
    those are rounded and may repeat.
    """
    counts_steps = hasattr(scheduler, "step_index")
    timesteps = None if counts_steps else scheduler.timesteps.tolist()
    if _is_flow(scheduler) or not hasattr(scheduler, "alphas_cumprod"):
        values = getattr(scheduler, "sigmas", scheduler.timesteps).tolist()
        if len(values) == len(scheduler.timesteps):
            values.append(0.0)
        steps = [abs(b - a) for a, b in pairwise(values)]
        return NoiseSchedule(values, values[:-1], steps, [RAW_OUTPUT] * len(steps), timesteps)
    table = [noise_angle(alpha) for alpha in scheduler.alphas_cumprod.tolist()]
    if counts_steps and hasattr(scheduler, "sigmas"):
        levels = scheduler.sigmas.tolist()
        angles = [math.atan(level) for level in levels]
        log_table = [math.log(math.tan(angle)) for angle in table]
        places = [
            fractional_index(log_table, math.log(level)) if level > 0.0 else 0.0
            for level in levels[:-1]
        ]
    else:
        places = timesteps or scheduler.timesteps.tolist()
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        angles = [*(table[int(place)] for place in places), noise_angle(final)]
    prediction = scheduler.config.prediction_type
    velocities = [RAW_OUTPUT] * len(places)
    if prediction not in PREDICTIONS:
        steps = [math.nan] * len(places)
    else:
        if latents_known:
            velocities = [velocity_weights(prediction, angle) for angle in angles[:-1]]
        steps = [
            followed(prediction, angle, after) / abs(weight)
            for (angle, after), (weight, _) in zip(pairwise(angles), velocities, strict=True)
        ]
    return NoiseSchedule(
        [math.sin(angle) for angle in angles],
        [place / len(table) for place in places],
        steps,
        velocities,
        timesteps,
    )


def log_snrs(scheduler: Any) -> list[float]:
    """Logarithm of the signal-to-noise ratio at every step, after ``set_timesteps``.

    At pure noise, where it is infinite, the line through the next two steps is continued. Needs
    three steps.
    """
    sigmas = read_schedule(scheduler).sigmas[:-1]
    flow = _is_flow(scheduler)
    logs = [
        2.0 * math.log((1.0 - sigma if flow else math.sqrt(1.0 - sigma**2)) / sigma)
        for sigma in sigmas[1:]
    ]
    return [min(2.0 * logs[0] - logs[1], logs[0]), *logs]
