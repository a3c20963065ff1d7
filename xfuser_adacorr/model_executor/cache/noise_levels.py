"""Variance-preserving noise schedules, written in the angle of the noise.

``x = cos(phi) * x0 + sin(phi) * noise`` with ``phi`` in [0, pi/2]; the noise level of the
variance-exploding notation is ``tan(phi)``, and ``alpha_cumprod = cos(phi)^2``.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence


def noise_angle(alpha_cumprod: float) -> float:
    """phi of a cumulative product of alphas in [0, 1]."""
    return math.atan2(math.sqrt(max(1.0 - alpha_cumprod, 0.0)), math.sqrt(alpha_cumprod))


def _followed_epsilon(angle: float, angle_next: float) -> float:
    return abs(math.sin(angle) - math.cos(angle) * math.tan(angle_next))


def _followed_sample(angle: float, angle_next: float) -> float:
    return _followed_epsilon(angle, angle_next) / math.tan(angle)


def _followed_v(angle: float, angle_next: float) -> float:
    return abs(angle - angle_next)


_FOLLOWED: dict[str, Callable[[float, float], float]] = {
    "epsilon": _followed_epsilon,
    "sample": _followed_sample,
    "v_prediction": _followed_v,
}
PREDICTIONS = tuple(_FOLLOWED)
"""Prediction types of a variance-preserving model, by diffusers' names."""


def followed(prediction: str, angle: float, angle_next: float) -> float:
    """How far one step follows the model's output, in units of the latents' scale.

    An error ``d`` of the output moves the latents, relative to their scale before the step, by this
    times ``d``: ``|ds| / sqrt(1 + s^2)`` with ``s = tan(phi)`` for ``epsilon``, that over ``s`` for
    ``sample``, and ``|dphi|`` for ``v_prediction`` (DDIM, arXiv 2010.02502, eq. 12, in the angle).
    """
    return _FOLLOWED[prediction](angle, angle_next)


def velocity_weights(prediction: str, angle: float) -> tuple[float, float]:
    """``(p, q)`` with ``p * output + q * latents = noise - x0``, flow matching's velocity.

    The output predicts ``noise``, ``x0`` or ``cos(phi) * noise - sin(phi) * x0``; what is left
    follows from ``latents = cos(phi) * x0 + sin(phi) * noise``. ``phi`` is inside (0, pi/2).
    """
    cos, sin = math.cos(angle), math.sin(angle)
    if prediction == "epsilon":
        return (cos + sin) / cos, -1.0 / cos
    if prediction == "sample":
        return -(cos + sin) / sin, 1.0 / sin
    return cos + sin, sin - cos


def fractional_index(ascending: Sequence[float], value: float) -> float:
    """Where ``value`` stands in a table of at least two values; outside, the end's slope goes on.

    With ``log(tan(phi))`` of every training timestep as the table this is the (fractional) training
    timestep of a noise level.
    """
    upper = min(max(bisect_left(ascending, value), 1), len(ascending) - 1)
    below, above = ascending[upper - 1], ascending[upper]
    return upper - 1 + (value - below) / (above - below)
