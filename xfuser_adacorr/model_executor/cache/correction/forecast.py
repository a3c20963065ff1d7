"""Forecasts of the model's output stand in for it; what they miss may be compensated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xfuser_adacorr.core.forecast import line_sums, line_weights, updated_damping
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord
from xfuser_adacorr.model_executor.cache.samplers import RAW_OUTPUT

from .compensation import Compensation

if TYPE_CHECKING:
    from .adacorrection import Score


@dataclass(slots=True)
class Outputs:
    """Refreshes of one branch; tensors are float32 copies in the output's shape."""

    v0: Tensor | None = None
    """What `Step.velocity` makes of the last computed output; ``v1``: of the one before."""
    v1: Tensor | None = None
    sigma0: float = 0.0
    """`Step.coordinate` of ``v0``, which is sigma for flow matching."""
    sigma1: float | None = None
    damping: Tensor | float = 1.0
    """Of the line's slope, as the refreshes so far found it to hold (`updated_damping`)."""
    channels: int = 0
    """Of the latents."""
    unread: list[Tensor] = field(default_factory=list)
    """What the last refresh found, to be read with the next decision."""
    debt: Any = None
    """The compensation's own state."""


class OutputForecast:
    """The line through the last two computed outputs, for calls that others choose.

    Its slope is damped by what the computed outputs show (`updated_damping`), on the device:
    nothing is read. ``compensation`` pays what reused calls owe, as the sampler allows.
    ``followed`` maps an output and the number of the latents' channels to the part of the output
    that the sampler follows, as a view. ``summed`` adds a vector of sums up over the ranks that
    hold parts of the output.
    """

    def __init__(
        self,
        compensation: Compensation,
        followed: Callable[[Tensor, int], Tensor] = lambda output, channels: output,
        summed: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        self.compensation = compensation
        self.followed = followed
        self.summed = summed

    def new_state(self) -> Outputs:
        return Outputs(debt=self.compensation.new_debt())

    def drift_sums(self, history: Outputs, latents: Tensor) -> list[Tensor]:
        """Scalars for a decision."""
        return []

    def unread(self, history: Outputs) -> list[Tensor]:
        """What the last refresh found, to be read with this decision."""
        return history.unread

    def reuse(
        self,
        history: Outputs,
        given: Tensor,
        step: Step,
        score: "Score | None",
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the forecast for the call at ``step``, which is given the latents ``given``."""
        return self.forecast(history, given, step, dtype)

    def forecast(self, history: Outputs, given: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
        """Return the line through the last two computed outputs at ``step``, as an output."""
        weights = self._weights(history, step)
        self.compensation.reused(history, step, weights)
        line, (p, q) = self._line(history, weights), step.velocity
        return self._combine_(line, given, history.channels, (1 / p, -q / p)).to(dtype)

    def refresh(
        self,
        history: Outputs,
        latents: Tensor,
        given: Tensor,
        output: Tensor,
        step: Step,
        score: "Score | None",
        record: CallRecord,
    ) -> Tensor:
        """Store a computed output and return it, compensated for skipped calls.

        ``latents`` are tokens ``[B, N, C]`` of what the transformer is ``given``.
        """
        history.channels = latents.shape[-1]
        fresh = self._velocity(output, given, history.channels, step)
        return self._store(history, output, fresh, step)

    def answered(self, history: Outputs, step: Step, record: CallRecord) -> None:
        """The call at ``step`` is over; its ``record`` says how, and what it cost."""

    def expected_psnr_db(self, histories: Iterable[Outputs]) -> float | None:
        """PSNR to be expected after these branches; None where nothing is known about it."""
        return None

    def _velocity(self, output: Tensor, given: Tensor, channels: int, step: Step) -> Tensor:
        """A float32 copy of the output, turned into what forecasts are lines of."""
        copy = output.detach().to(torch.float32, copy=True)
        return self._combine_(copy, given, channels, step.velocity)

    def _combine_(
        self, output: Tensor, given: Tensor, channels: int, weights: tuple[float, float]
    ) -> Tensor:
        """The output, in place ``p * output + q * given`` in what the sampler follows."""
        p, q = weights
        if weights != RAW_OUTPUT:
            self.followed(output, channels).mul_(p).add_(given.detach().float(), alpha=q)
        return output

    def _store(self, history: Outputs, output: Tensor, fresh: Tensor, step: Step) -> Tensor:
        result = self.compensation.refreshed(history, output, fresh, step)
        if history.v0 is not None and history.sigma0 != step.coordinate:
            self._judge_line(history, fresh, step)
            history.v1, history.sigma1 = history.v0, history.sigma0
        history.v0, history.sigma0 = fresh, step.coordinate
        return result

    def _judge_line(self, history: Outputs, fresh: Tensor, step: Step) -> None:
        """Damp further lines by how the one through the refreshes so far meets ``fresh``."""
        if history.v1 is None:
            return
        _, a1 = line_weights(step.coordinate, history.sigma0, history.sigma1)
        predicted = a1 * self.followed(history.v1 - history.v0, history.channels)
        happened = self.followed(fresh - history.v0, history.channels)
        sums = self.summed(line_sums(predicted, happened))
        history.damping = updated_damping(history.damping, sums)

    @staticmethod
    def _weights(history: Outputs, step: Step) -> tuple[Tensor | float, Tensor | float]:
        return line_weights(step.coordinate, history.sigma0, history.sigma1, history.damping)

    @staticmethod
    def _line(history: Outputs, weights: tuple[Tensor | float, Tensor | float]) -> Tensor:
        """A tensor of its own."""
        a0, a1 = weights
        return history.v0.clone() if history.v1 is None else a0 * history.v0 + a1 * history.v1
