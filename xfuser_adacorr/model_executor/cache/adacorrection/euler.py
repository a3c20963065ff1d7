"""Repair for Euler steps ``x <- x + dsigma * output``: a later output carries what is owed."""

from torch import Tensor

from xfuser_adacorr.model_executor.cache.forecasts import Forecast, LineWeights
from xfuser_adacorr.model_executor.cache.step import Step


def owed_weights(
    skipped: list[tuple[float, LineWeights]], sigma0: float, sigma: float
) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Weights of ``V0, V1, v`` in what the skipped steps owe the latents.

    ``sum_j dsigma_j (blend_j - forecast_j)``: the steps skipped at ``sigma_j`` with the weights
    ``(a0, a1)`` should have used the blend ``(1 - w_j) V0 + w_j v`` of cached and fresh,
    ``w_j = (sigma0 - sigma_j) / (sigma0 - sigma)``; V0 was computed at ``sigma0``, v at ``sigma``.
    """
    ends = [*(start for start, _ in skipped[1:]), sigma]
    d0 = d1 = d = 0.0
    for (start, (a0, a1)), end in zip(skipped, ends, strict=True):
        w, step_size = (sigma0 - start) / (sigma0 - sigma), end - start
        d0 = d0 + step_size * (1.0 - w - a0)
        d1 = d1 - step_size * a1
        d = d + step_size * w
    return d0, d1, d


class EulerRepair:
    """Remembers the skipped steps, and has the next refresh pay for them."""

    def __init__(self) -> None:
        self._skipped: list[tuple[float, LineWeights]] = []
        self._guessed: tuple[Tensor, Step] | None = None
        """What was paid last, where its step size was only guessed."""

    def owe(self, step: Step, weights: LineWeights) -> None:
        """A forecast with these weights was used at ``step``."""
        self._skipped.append((step.sigma, weights))

    def pay(self, step: Step, fresh: Tensor, forecast: Forecast) -> Tensor:
        """The output at ``step`` with ``(C - D) / dsigma`` added; ``forecast`` is not yet updated.

        The last step pays nothing, since nothing could follow it.
        """
        owed = None
        if self._skipped:
            d0, d1, d = owed_weights(self._skipped, forecast.t0, step.sigma)
            owed = d0 * forecast.v0 + d * fresh
            if forecast.v1 is not None:
                owed = owed + d1 * forecast.v1
        if self._guessed is not None:  # the step that paid was longer or shorter than guessed
            paid, past = self._guessed
            reached = self._skipped[0][0] if self._skipped else step.sigma
            remainder = (past.sigma_next - reached) * paid
            owed = remainder if owed is None else owed + remainder
        self._skipped, self._guessed = [], None
        step_size = step.sigma_next - step.sigma
        if owed is None or step.is_last or step_size == 0.0:
            return fresh
        payment = owed / step_size
        if not step.exact:
            self._guessed = payment, step
        return fresh + payment

    # -- at the sampler step ---------------------------------------------------------------------

    def skip(self, original, arguments, step: Step, weights: LineWeights):
        """Step the sampler with the forecast that ``arguments`` hold; the next refresh pays."""
        self.owe(step, weights)
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

    def owe(self, step: Step, weights: LineWeights) -> None:
        pass

    def pay(self, step: Step, fresh: Tensor, forecast: Forecast) -> Tensor:
        return fresh

    def skip(self, original, arguments, step: Step, weights: LineWeights):
        return original(**arguments)

    def refresh(self, original, arguments, step: Step, fresh: Tensor, forecast: Forecast):
        return original(**arguments)

    def tensors(self) -> list[Tensor]:
        return []
