"""Repair for Euler steps ``x <- x + dsigma * output``: a later output carries what is owed."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.forecasts import Forecast
from xfuser_adacorr.model_executor.cache.step import Step


def owed(skipped: Sequence[Step], step: Step, fresh: Tensor, forecast: Forecast) -> Tensor | float:
    """What the ``skipped`` steps owe the latents at ``step``, where ``fresh`` was computed.

    ``sum_j dsigma_j (blend_j - forecast_j)``: the step skipped at ``sigma_j`` should have used the
    blend ``v0 + (sigma0 - sigma_j) / (sigma0 - sigma) (v - v0)`` of cached and fresh.
    """
    v0, t0, total = forecast.v0, forecast.t0, 0.0
    for past, after in pairwise([*skipped, step]):
        blend = v0 + (t0 - past.sigma) / (t0 - step.sigma) * (fresh - v0)
        total = total + (after.sigma - past.sigma) * (blend - forecast(past))
    return total


class EulerRepair:
    """Remembers the skipped steps, and has the next refresh pay for them."""

    def __init__(self) -> None:
        self._skipped: list[Step] = []
        self._guessed: tuple[Tensor, Step] | None = None
        """What was paid last, where its step size was only guessed."""

    def owe(self, step: Step) -> None:
        """A forecast stood in at ``step``."""
        self._skipped.append(step)

    def pay(self, step: Step, fresh: Tensor, forecast: Forecast) -> Tensor:
        """The output at ``step`` with what is owed added; ``forecast`` is not yet updated.

        The last step pays nothing, since nothing could follow it. Nor is anything paid where the
        forecast is ``lost``: the output was computed at latents that say nothing of the true ones.
        """
        debt = owed(self._skipped, step, fresh, forecast)
        if self._skipped and forecast.lost is not None:
            debt = torch.where(forecast.lost, 0.0, debt)
        if self._guessed is not None:  # the step that paid was longer or shorter than guessed
            paid, past = self._guessed
            reached = self._skipped[0] if self._skipped else step
            debt = debt + (past.sigma_next - reached.sigma) * paid
        nothing = not self._skipped and self._guessed is None
        self._skipped, self._guessed = [], None
        step_size = step.sigma_next - step.sigma
        if nothing or step.is_last or step_size == 0.0:
            return fresh
        payment = debt / step_size
        if not step.exact:
            self._guessed = payment, step
        return fresh + payment

    # -- at the sampler step ---------------------------------------------------------------------

    def skip(self, original, arguments, step: Step):
        """Step the sampler with the forecast that ``arguments`` hold; the next refresh pays."""
        self._skipped.append(step)
        return original(**arguments)

    def refresh(self, original, arguments, step: Step, fresh: Tensor, forecast: Forecast):
        """Step the sampler with the computed output, which pays for the skipped steps."""
        paid = self.pay(step, fresh, forecast)
        steps_differ = arguments.get("per_token_timesteps") is not None
        if paid is not fresh and not steps_differ:
            arguments["model_output"] = paid.to(arguments["model_output"].dtype)
        return original(**arguments)

    def tensors(self) -> list[Tensor]:
        return [] if self._guessed is None else [self._guessed[0]]


class NoRepair:
    """The forecast alone, for samplers that draw noise: what skipped steps owe stays unpaid."""

    def owe(self, step: Step) -> None:
        pass

    def pay(self, step: Step, fresh: Tensor, forecast: Forecast) -> Tensor:
        return fresh

    def skip(self, original, arguments, step: Step):
        return original(**arguments)

    def refresh(self, original, arguments, step: Step, fresh: Tensor, forecast: Forecast):
        return original(**arguments)

    def tensors(self) -> list[Tensor]:
        return []
