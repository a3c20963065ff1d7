"""What is known about diffusers' samplers: where their steps stand, and which repair fits them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

from .noise_levels import PREDICTIONS, followed, fractional_index, noise_angle, velocity_weights
from .step import RAW_OUTPUT, Step

EULER = ("FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler")
"""Step ``x <- x + c * dsigma * output``: what skipped steps owe is paid in a later output."""
MULTISTEP = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""They use earlier outputs too."""
RESAMPLED = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    *MULTISTEP,
)
"""Deterministic, one call a step, and all of their state in attributes: they can be set back."""
REPAIRED = EULER + RESAMPLED
STEP_ARGUMENTS = ("model_output", "timestep", "sample")
"""Arguments of ``step`` that a cache at the sampler step reads and replaces."""
VARIANCE_EXPLODING = (
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Their latents are ``x0 + tan(phi) * noise``, which the pipeline scales for the model."""
PRECONDITIONED = (
    "CosineDPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
)
"""EDM (arXiv 2206.00364): as above, and the model's output is scaled into the picture."""
UNTELLING = {"epsilon": math.pi / 2.0, "sample": 0.0}
"""Angle of the noise at which an output of this type tells nothing of the velocity."""
FLOW_LIMIT = 1.5
"""Above all noise levels of flow matching, which samplers may overstep a little."""
XFUSER_WRAPPER = "xFuserSchedulerBaseWrapper"

RepairKind = Literal["euler", "resample", "none"]


def unwrapped(scheduler: Any) -> Any:
    """The diffusers scheduler within xfuser's wrapper of it, or the scheduler itself."""
    return scheduler.module if is_known_as(scheduler, (XFUSER_WRAPPER,)) else scheduler


def is_known_as(scheduler: Any, names: Sequence[str]) -> bool:
    """Whether the scheduler is of one of the classes, or of a subclass."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def check_scheduler(scheduler: Any) -> None:
    """Raise `ValueError` naming what a scheduler lacks for a cache at the sampler step."""
    scheduler = unwrapped(scheduler)
    missing = [name for name in ("timesteps", "config", "step") if not hasattr(scheduler, name)]
    if missing:
        raise ValueError(
            f"scheduler must have timesteps, a config and step(), as diffusers' schedulers do; "
            f"{type(scheduler).__name__} lacks {', '.join(missing)}"
        )
    arguments = signature(scheduler.step).parameters
    missing = [name for name in STEP_ARGUMENTS if name not in arguments]
    if missing:
        raise ValueError(
            f"scheduler: step() of {type(scheduler).__name__} must take "
            f"{', '.join(STEP_ARGUMENTS)}; it lacks {', '.join(missing)}"
        )


def repair_of(scheduler: Any) -> RepairKind:
    """How steps made with forecasts can be mended: not at all for samplers that draw noise."""
    config = scheduler.config
    stochastic = getattr(config, "stochastic_sampling", False) or str(
        getattr(config, "algorithm_type", "")
    ).startswith("sde")
    # A nested predictor's state is not an attribute of the scheduler.
    nested = getattr(scheduler, "solver_p", None) is not None
    several_calls = getattr(scheduler, "order", 1) != 1 or not getattr(
        config, "skip_prk_steps", True
    )
    if stochastic or nested or several_calls:
        return "none"
    if is_known_as(scheduler, EULER):
        return "euler"
    return "resample" if is_known_as(scheduler, RESAMPLED) else "none"


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
    config = config if isinstance(config, Mapping) else vars(config)
    options = {name: config[name] for name in SAMPLER_OPTIONS if name in config}
    return {"class": type(scheduler).__name__, **options}


def _is_flow(scheduler: Any) -> bool:
    """Flow matching: ``x = (1 - sigma) * x0 + sigma * noise``."""
    config = scheduler.config
    if getattr(config, "use_flow_sigmas", False):
        return True
    has_alphas = hasattr(scheduler, "alphas_cumprod")
    flow = hasattr(scheduler, "sigmas") and not has_alphas
    flow = flow and not is_known_as(scheduler, PRECONDITIONED)
    flow = flow and getattr(config, "prediction_type", None) in (None, "flow_prediction")
    return flow and (is_known_as(scheduler, EULER) or max(scheduler.sigmas.tolist()) <= FLOW_LIMIT)


def _is_exploding(scheduler: Any, steps: int) -> bool:
    """Noise levels of ``x = x0 + sigma * noise``, and nothing else known: flow's end at 1."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or hasattr(scheduler, "alphas_cumprod") or len(sigmas) <= steps:
        return False
    return max(sigmas.tolist()) > FLOW_LIMIT


@dataclass(frozen=True, slots=True)
class Places:
    """One run's steps on the host, and the sampler that takes them."""

    steps: tuple[Step, ...]
    """One for each call of ``scheduler.step``; a Heun-like sampler takes two with one index."""
    sampler: dict[str, Any]
    """Class and options (`describe_sampler`)."""

    @property
    def coordinates(self) -> list[float]:
        return [step.coordinate for step in self.steps]

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of all steps, and what the last one steps to."""
        return [*(step.sigma for step in self.steps), self.steps[-1].sigma_next]

    def nearest(self, timestep: float) -> int:
        """Which of ``steps`` is at this timestep; of equal ones (PNDM) the first."""
        return min(
            range(len(self.steps)), key=lambda i: (abs(self.steps[i].timestep - timestep), i)
        )


def read_places(scheduler: Any, latents_known: bool = True) -> Places:
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
    given = scheduler.timesteps.tolist()  # whole numbers stay so: DDIM looks values up by them
    timesteps = [float(t) for t in given]
    if _is_flow(scheduler):
        rows = _flow_rows(scheduler, timesteps)
    elif is_known_as(scheduler, PRECONDITIONED):
        rows = _preconditioned_rows(scheduler)
    elif _is_exploding(scheduler, len(timesteps)):
        rows = _exploding_rows(scheduler, len(timesteps))
    elif hasattr(scheduler, "alphas_cumprod"):
        rows = _variance_preserving_rows(scheduler, timesteps, latents_known)
    else:
        rows = _unknown_rows(timesteps)
    calls_a_step = 2 if getattr(scheduler, "order", 1) == 2 else 1
    count = -(-len(timesteps) // calls_a_step)
    steps = tuple(
        Step(
            place // calls_a_step,
            remaining=count - place // calls_a_step,
            timestep=given[place],
            follows=place % calls_a_step > 0,
            **row,
        )
        for place, row in enumerate(rows)
    )
    return Places(steps, describe_sampler(scheduler))


def _flow_rows(scheduler: Any, timesteps: list[float]) -> list[dict[str, Any]]:
    sigmas = scheduler.sigmas.tolist()[: len(timesteps) + 1]
    if len(sigmas) == len(timesteps):
        sigmas.append(0.0)
    return [{"sigma": a, "sigma_next": b} for a, b in pairwise(sigmas)]


def _preconditioned_rows(scheduler: Any) -> list[dict[str, Any]]:
    """The model's output F gives the picture ``c_skip * x + c_out * F`` (EDM, eq. 7)."""
    data, kind = scheduler.config.sigma_data, scheduler.config.prediction_type
    rows = []
    for level, after in pairwise(scheduler.sigmas.tolist()):
        total = level**2 + data**2
        skip, out = data**2 / total, level * data / math.sqrt(total)
        out = -out if kind == "v_prediction" else out
        angle, scale = math.atan(level), math.cos(math.atan(level))
        to_picture = 1.0 + 1.0 / level
        rows.append(
            {
                "sigma": math.sin(angle),
                "sigma_next": math.sin(math.atan(after)),
                "coordinate": angle / (math.pi / 2.0),
                "step_gain": abs(math.atan(after) - angle),
                "velocity": (-to_picture * out, (1.0 / level - to_picture * skip) / scale),
                "scale": scale,
                "mass": math.cos(angle) + math.sin(angle),
            }
        )
    return rows


def _variance_preserving_rows(
    scheduler: Any, timesteps: list[float], latents_known: bool
) -> list[dict[str, Any]]:
    table = [noise_angle(alpha) for alpha in scheduler.alphas_cumprod.tolist()]
    levels = scheduler.sigmas.tolist() if hasattr(scheduler, "sigmas") else []
    if hasattr(scheduler, "step_index") and len(levels) > len(timesteps):
        levels = levels[: len(timesteps) + 1]
        angles = [math.atan(level) for level in levels]
        log_table = [math.log(math.tan(angle)) for angle in table]
        places = [
            fractional_index(log_table, math.log(level)) if level > 0.0 else 0.0
            for level in levels[:-1]
        ]
    else:
        places = timesteps
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        last = len(table) - 1
        angles = [*(table[min(max(int(place), 0), last)] for place in places), noise_angle(final)]
    exploding = is_known_as(scheduler, VARIANCE_EXPLODING)
    prediction = getattr(scheduler.config, "prediction_type", None)
    rows = []
    for (angle, after), place in zip(pairwise(angles), places, strict=True):
        row = {
            "sigma": math.sin(angle),
            "sigma_next": math.sin(after),
            "coordinate": place / len(table),
            "scale": math.cos(angle) if exploding else 1.0,
            "mass": math.cos(angle) + math.sin(angle),
        }
        if prediction in PREDICTIONS and angle != UNTELLING.get(prediction):
            weights = velocity_weights(prediction, angle)
            row["velocity"] = weights if latents_known else RAW_OUTPUT
            row["step_gain"] = followed(prediction, angle, after) / abs(row["velocity"][0])
        rows.append(row)
    return rows


def _exploding_rows(scheduler: Any, count: int) -> list[dict[str, Any]]:
    """Of a sampler of ``x0 + sigma * noise`` whose model's output is not known (consistency)."""
    levels = [math.atan(level) for level in scheduler.sigmas.tolist()[: count + 1]]
    return [
        {
            "sigma": math.sin(angle),
            "sigma_next": math.sin(after),
            "coordinate": angle / (math.pi / 2.0),
            "step_gain": abs(after - angle),
            "scale": math.cos(angle),
            "mass": math.cos(angle) + math.sin(angle),
        }
        for angle, after in pairwise(levels)
    ]


def _unknown_rows(timesteps: list[float]) -> list[dict[str, Any]]:
    """Of a sampler whose noise levels are not known: the timestep over the largest one."""
    largest = max(abs(t) for t in timesteps) or 1.0
    levels = [abs(t) / largest for t in timesteps]
    return [{"sigma": a, "sigma_next": b} for a, b in pairwise([*levels, 0.0])]


def log_snrs(places: Places) -> list[float]:
    """Logarithm of the signal-to-noise ratio at every step.

    At pure noise, where it is infinite, the line through the next two steps is continued. Needs
    three steps.
    """
    logs = []
    for step in places.steps[1:]:
        flow = step.mass == 1.0
        picture = 1.0 - step.sigma if flow else math.sqrt(1.0 - step.sigma**2)
        logs.append(2.0 * math.log(picture / step.sigma))
    return [min(2.0 * logs[0] - logs[1], logs[0]), *logs]
