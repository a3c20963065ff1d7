"""Flow coordinates, in which every deterministic sampler follows the same equation.

Latents ``x = a * picture + s * noise`` become ``y = x / (a + s)`` at the time ``t = s / (a + s)``,
and with flow matching's velocity ``u = noise - picture`` the sampler solves ``dy/dt = u``, from
``t`` near 1 down to 0. Flow matching's own latents and noise levels are ``y`` and ``t``.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from .schedulers import Places


@dataclass(frozen=True, slots=True)
class FlowPoint:
    """Where a step begins, or the last one ends."""

    time: float
    """t in [0, 1]."""
    factor: float
    """``y = factor * x`` for the sampler's latents x."""

    def to_flow(self, latents: Tensor) -> Tensor:
        """y of the sampler's latents, float32, a tensor of its own unless nothing changes."""
        values = latents.detach().float()
        return values if self.factor == 1.0 else values * self.factor

    def to_latents(self, y: Tensor, like: Tensor) -> Tensor:
        """The sampler's latents at y, in the dtype of ``like``."""
        return (y if self.factor == 1.0 else y / self.factor).to(like.dtype)


def flow_points(places: Places) -> tuple[FlowPoint, ...]:
    """The places of a run's steps and of its end: one more than steps."""
    points = [FlowPoint(step.sigma / step.mass, step.scale / step.mass) for step in places.steps]
    return (*points, _end(places))


def _end(places: Places) -> FlowPoint:
    noise = places.steps[-1].sigma_next
    if all(step.mass == 1.0 for step in places.steps):  # flow matching
        return FlowPoint(noise, 1.0)
    picture = math.sqrt(1.0 - noise**2)
    scaled = any(step.scale != 1.0 for step in places.steps)
    mass = picture + noise
    return FlowPoint(noise / mass, (picture if scaled else 1.0) / mass)


REVERSED = ("RectifiedFlowScheduler",)
"""Samplers whose model predicts ``picture - noise``."""


def direction(places: Places) -> float:
    """Sign of the velocity that a sampler's steps tell: -1 where they tell ``-dy/dt``."""
    return -1.0 if places.sampler["class"] in REVERSED else 1.0
