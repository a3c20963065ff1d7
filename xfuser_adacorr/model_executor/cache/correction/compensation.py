"""What mends the latents for outputs that were forecast: nothing, or a later output (Euler)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xfuser_adacorr.core.blend import displacement_weights
from xfuser_adacorr.model_executor.cache.clock import Step

if TYPE_CHECKING:
    from .adacorrection import History


LineWeights = tuple[Tensor | float, Tensor | float]
"""What `core.forecast.line_weights` gives."""


class Compensation:
    """The forecast alone, for samplers that draw noise: what reused calls owe stays unpaid.

    Subclasses pay it. `AdaCorrection` tells every reuse and refresh of a branch to `reused` and
    `refreshed`, and the outcome of every call of any branch to `called`.
    """

    def new_debt(self) -> Any:
        """Fresh state of one branch of one generation."""
        return None

    def reused(self, history: "History", step: Step, weights: LineWeights) -> None:
        """A forecast with these weights of V0 and V1 has been returned for ``step``."""

    def refreshed(self, history: "History", output: Tensor, fresh: Tensor, step: Step) -> Tensor:
        """What the refreshed call at ``step`` returns for its ``output`` (``fresh``: in float32).

        ``history`` still stands at the refresh before.
        """
        return output

    def called(self, step: Step, refreshed: bool) -> None:
        """A call of the transformer has been answered."""

    def needs_refresh(self, step: Step) -> bool:
        """Whether the call at ``step`` has to be computed, whatever its branch decides."""
        return False

    def held(self) -> list[Tensor]:
        """Tensors kept for all branches together."""
        return []

    def release(self) -> None:
        """The generation is over: forget everything, let go of the scheduler."""


@dataclass(slots=True)
class EulerDebt:
    """What one branch's reused calls may still owe the latents."""

    skipped: list[tuple[float, LineWeights]] = field(default_factory=list)
    """(sigma, forecast weights) of the calls reused since the last refresh."""
    compensation: Tensor | None = None
    """Compensation at the last refresh, kept where its step size was only guessed."""
    compensated_step: Step | None = None


class EulerCompensation(Compensation):
    """For ``x <- x + dsigma * output``: the refreshed output carries what skipped calls owe."""

    def new_debt(self) -> EulerDebt:
        return EulerDebt()

    def reused(self, history: "History", step: Step, weights: LineWeights) -> None:
        history.debt.skipped.append((step.sigma, weights))

    def refreshed(self, history: "History", output: Tensor, fresh: Tensor, step: Step) -> Tensor:
        """Return ``v + (C - D) / dsigma``: C - D is what the skipped calls owe the latents."""
        debt, owed = history.debt, None
        if debt.skipped:
            sigmas, applied = zip(*debt.skipped, strict=True)
            d0, d1, d = displacement_weights(
                sigmas, applied, step.sigma, history.sigma0, history.sigma1
            )
            owed = d0 * history.v0 + d * fresh
            if history.v1 is not None:
                owed = owed + d1 * history.v1
        if debt.compensation is not None:
            remainder = self._guess_error(debt, step) * debt.compensation
            owed = remainder if owed is None else owed + remainder
        debt.compensation, debt.compensated_step, debt.skipped = None, None, []
        step_size = step.sigma_next - step.sigma
        if owed is None or step.remaining == 1 or step_size == 0.0:
            return output
        compensation = owed / step_size
        if not step.exact:
            debt.compensation, debt.compensated_step = compensation, step
        return (fresh + compensation).to(output.dtype)

    @staticmethod
    def _guess_error(debt: EulerDebt, step: Step) -> float:
        """How much longer the last compensated step was guessed than it turned out to be."""
        past = debt.compensated_step
        reached = debt.skipped[0][0] if debt.skipped else step.sigma
        return past.sigma_next - reached
