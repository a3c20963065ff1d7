"""Forecasts of the model's output stand in for it; what they miss may be compensated."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xfuser_adacorr.core.forecast import line_weights
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord

from .compensation import Compensation

if TYPE_CHECKING:
    from .adacorrection import Score


@dataclass(slots=True)
class Outputs:
    """Refreshes of one branch; tensors are float32 copies in the latents' shape."""

    v0: Tensor | None = None
    v1: Tensor | None = None
    sigma0: float = 0.0
    """`Step.coordinate` of ``v0``, which is sigma for flow matching."""
    sigma1: float | None = None
    unread: list[Tensor] = field(default_factory=list)
    """What the last refresh found, to be read with the next decision."""
    debt: Any = None
    """The compensation's own state."""


class OutputForecast:
    """The line through the last two computed outputs, for calls that others choose.

    Nothing is measured. ``compensation`` pays what reused calls owe, as the sampler allows.
    """

    def __init__(self, compensation: Compensation) -> None:
        self.compensation = compensation

    def new_state(self) -> Outputs:
        return Outputs(debt=self.compensation.new_debt())

    def drift_sums(self, history: Outputs, latents: Tensor) -> list[Tensor]:
        """Scalars for a decision."""
        return []

    def unread(self, history: Outputs) -> list[Tensor]:
        """What the last refresh found, to be read with this decision."""
        return history.unread

    def reuse(
        self, history: Outputs, step: Step, score: "Score | None", dtype: torch.dtype
    ) -> Tensor:
        """Return the forecast ``[B, N, C]`` for the call at ``step``."""
        return self.forecast(history, step, dtype)

    def forecast(self, history: Outputs, step: Step, dtype: torch.dtype) -> Tensor:
        """Return the line through the last two computed outputs at ``step``."""
        weights = self._weights(history, step)
        self.compensation.reused(history, step, weights)
        return self._line(history, weights).to(dtype)

    def refresh(
        self,
        history: Outputs,
        latents: Tensor,
        output: Tensor,
        step: Step,
        score: "Score | None",
        record: CallRecord,
    ) -> Tensor:
        """Store a computed output ``[B, N, C]`` and return it, compensated for skipped calls."""
        fresh = output.detach().to(torch.float32, copy=True)
        return self._store(history, output, fresh, step)

    def answered(self, history: Outputs, step: Step, record: CallRecord) -> None:
        """The call at ``step`` is over; its ``record`` says how, and what it cost."""

    def expected_psnr_db(self, histories: Iterable[Outputs]) -> float | None:
        """PSNR to be expected after these branches; None where nothing is known about it."""
        return None

    def _store(self, history: Outputs, output: Tensor, fresh: Tensor, step: Step) -> Tensor:
        result = self.compensation.refreshed(history, output, fresh, step)
        if history.v0 is not None and history.sigma0 != step.coordinate:
            history.v1, history.sigma1 = history.v0, history.sigma0
        history.v0, history.sigma0 = fresh, step.coordinate
        return result

    @staticmethod
    def _weights(history: Outputs, step: Step) -> tuple[float, float]:
        return line_weights(step.coordinate, history.sigma0, history.sigma1)

    @staticmethod
    def _line(history: Outputs, weights: tuple[float, float]) -> Tensor:
        a0, a1 = weights
        return history.v0 if history.v1 is None else a0 * history.v0 + a1 * history.v1
