"""Forecasts: what stands in for an output that is not computed.

They continue flow matching's velocity, noise - picture, whatever a model predicts (`as_velocity`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .step import RAW_OUTPUT, Step

DAMPING_MEMORY = 0.5
"""What earlier refreshes count at each further one, in the damping of the line."""
LOST_MISS = 0.8
"""Misses of this share of the output's own size, `LOST_AFTER` refreshes in a row, make a forecast
lost."""
LOST_AFTER = 3


def as_velocity(output: Tensor, latents: Tensor, step: Step) -> Tensor:
    """``p * output + q * scale * latents`` as float32, a tensor of its own (`Step.velocity`)."""
    velocity = output.detach().to(torch.float32, copy=True)
    p, q = step.velocity
    if step.velocity != RAW_OUTPUT and output.shape == latents.shape:
        velocity.mul_(p).add_(latents.detach().float(), alpha=q * step.scale)
    return velocity


def as_output(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
    """The output that is this velocity at these latents: the inverse, float32."""
    p, q = step.velocity
    if step.velocity == RAW_OUTPUT or velocity.shape != latents.shape:
        return velocity
    return (velocity - (q * step.scale) * latents.float()) / p


class Forecast(Protocol):
    """Learns the computed outputs one after the other, and continues them.

    ``v0`` is the last computed output at coordinate ``t0`` (`Step.coordinate`), ``v1`` at ``t1``
    the one before; both None until there is one. All outputs are flow matching's velocity, float32.
    """

    v0: Tensor | None
    v1: Tensor | None
    t0: float
    t1: float
    lost: Tensor | None
    """Whether the last refreshes that `missed` was asked for missed by almost the output's own size
    (`LOST_MISS`, `LOST_AFTER`), a scalar on the device; None: never found out."""

    def __call__(self, step: Step) -> Tensor:
        """The forecast at ``step``, a tensor of its own."""

    def missed(self, step: Step, fresh: Tensor) -> list[Tensor]:
        """``[||fresh - forecast||^2, ||fresh||^2]`` (scalars; the first NaN without a forecast)."""

    def update(self, step: Step, fresh: Tensor) -> None:
        """``fresh`` was computed at ``step``."""


class LastValue:
    """The last computed output, whatever came before (order 0)."""

    lost: Tensor | None = None

    def __init__(self) -> None:
        self.v0: Tensor | None = None
        self.v1: Tensor | None = None
        self.t0 = self.t1 = 0.0
        self.view: Callable[[Tensor], Tensor] = lambda output: output
        """The part of an output that the sampler follows; the rest is a learned variance."""

    def __call__(self, step: Step) -> Tensor:
        return self.v0.clone()

    def missed(self, step: Step, fresh: Tensor) -> list[Tensor]:
        error = torch.full((), torch.nan, device=fresh.device)
        if self.v1 is not None or (self.v0 is not None and self.t0 != step.coordinate):
            error = self.view(fresh - self(step)).square().sum()
        return [error, self.view(fresh).square().sum()]

    def update(self, step: Step, fresh: Tensor) -> None:
        if self.v0 is not None and self.t0 != step.coordinate:
            self.v1, self.t1 = self.v0, self.t0
        self.v0, self.t0 = fresh, step.coordinate


class Line(LastValue):
    """The line through the last two computed outputs (order 1)."""

    slope_kept: Tensor | float = 1.0
    """Share of the line's slope that is used, in [0, 1]."""

    def __call__(self, step: Step) -> Tensor:
        if self.v1 is None:
            return self.v0.clone()
        r = self.slope_kept * ((step.coordinate - self.t0) / (self.t0 - self.t1))
        return (1.0 + r) * self.v0 - r * self.v1


class DampedLine(Line):
    """A line whose slope is damped by how far earlier ones held, on the device: nothing is read.

    ``summed`` adds a vector of sums up over the ranks that hold parts of the output.
    """

    def __init__(self, summed=lambda sums: sums) -> None:
        super().__init__()
        self._summed = summed
        self._missed_in_a_row: Tensor | int = 0
        """Refreshes up to the last one that missed by `LOST_MISS` or more."""
        self._slope: Tensor | None = None
        """Sums of `updated_damping` for the coming `update`: one message tells them and `lost`."""

    def missed(self, step: Step, fresh: Tensor) -> list[Tensor]:
        found = super().missed(step, fresh)
        if self.v0 is not None:
            sums = self._summed(torch.stack([*found, *self._slope_sums(step, fresh)]))
            self._slope = sums[2:] if len(sums) > 2 else None
            wrong = sums[0] >= LOST_MISS**2 * sums[1]
            self._missed_in_a_row = torch.where(wrong, self._missed_in_a_row + 1, 0)
            self.lost = self._missed_in_a_row >= LOST_AFTER
        return found

    def update(self, step: Step, fresh: Tensor) -> None:
        slope, self._slope = self._slope, None
        if slope is None and (sums := self._slope_sums(step, fresh)):  # `missed` was not asked for
            slope = self._summed(torch.stack(sums))
        if slope is not None:
            self.slope_kept = updated_damping(self.slope_kept, slope)
        super().update(step, fresh)

    def _slope_sums(self, step: Step, fresh: Tensor) -> list[Tensor]:
        """``[<happened, predicted>, ||predicted||^2]``; none before there is a line."""
        if self.v1 is None or self.t0 == step.coordinate:
            return []
        r = (step.coordinate - self.t0) / (self.t0 - self.t1)
        predicted = r * self.view(self.v0 - self.v1)
        happened = self.view(fresh - self.v0)
        return [(happened * predicted).sum(), predicted.square().sum()]


def updated_damping(damping: Tensor | float, sums: Tensor) -> Tensor:
    """The damping after a refresh, a scalar in [0, 1] on the device of ``sums``.

    ``sums`` is ``[<happened, predicted>, ||predicted||^2]``: the change since the refresh before,
    as it was and as the undamped line had it. The quotient of the two is 1 where the line was
    right, 1/2 where it was as wrong as the last value, and below where it was worse: from 1/2 on
    the line counts in full, below in proportion, averaged with earlier refreshes.
    """
    share = (2.0 * sums[0] / sums[1]).clamp(0.0, 1.0)
    share = torch.where(sums[1] > 0.0, share, 1.0)
    return DAMPING_MEMORY * damping + (1.0 - DAMPING_MEMORY) * share


FORECASTS = {"last": LastValue, "line": Line, "damped line": DampedLine}
