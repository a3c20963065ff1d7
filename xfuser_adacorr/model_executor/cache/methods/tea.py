"""TeaCache: the modulated input of the first block, through a polynomial, accumulated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.signals import l1_sums, ratio

from .base import BlockCall, Decision, Read, Signal, StackMethod, Streams, reuse_or_base
from .options import StackOptions
from .residual import StackResidual


@dataclass(frozen=True, kw_only=True, slots=True)
class Tea(StackOptions):
    """Skip while the modulated input's changes, through a polynomial, add up to less."""

    label: ClassVar[str] = "Tea"

    calibration: str | None = None
    """File with a fitted polynomial; None: the one beside the model, else the published one, else
    the identity."""

    def stack_method(self, model, family) -> "AccumulatedChange":
        from xfuser_adacorr.model_executor.cache.calibration.tea import load_tea_polynomial
        from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
            TeaPolynomial,
            config_of,
        )

        polynomial = (
            load_tea_polynomial(model, self.calibration)
            or family.published_polynomial(config_of(model))
            or TeaPolynomial(coefficients=(1.0, 0.0))
        )
        return AccumulatedChange(
            self.threshold_for(family), polynomial, family.modulated_input, family.output_stream
        )


@dataclass(slots=True)
class TeaState:
    previous: Tensor | None = None
    """Modulated input of the last call, computed or not ``[B, N, D]``."""
    accumulated: float = 0.0
    stack: StackResidual = field(default_factory=StackResidual)


class AccumulatedChange(StackMethod):
    """Skip iff ``a < threshold``, where ``a += p(mean|F - F_prev| / mean|F_prev|)``.

    F is the modulated input of the first block, ``F_prev`` that of the last call seen; a is zeroed
    on computed calls; increments are clamped at 0 and p's input to its fit range. A hit returns
    ``h + R`` with the whole stack's residual. The first and the last call are computed.
    Source: Liu et al., Timestep Embedding Tells (arXiv 2411.19108).
    """

    def __init__(
        self,
        threshold: float,
        polynomial: Callable[[float], float],
        modulated_input: Callable[[nn.Module, Mapping[str, Any]], Tensor],
        stream: str,
    ) -> None:
        self.threshold, self.polynomial = threshold, polynomial
        self.modulated_input, self.stream = modulated_input, stream

    def new_state(self) -> TeaState:
        return TeaState()

    def measure(self, state: TeaState, call: BlockCall) -> Signal:
        current = self.modulated_input(call.block, call.arguments)
        signal = Signal() if state.previous is None else Signal(l1_sums(current, state.previous))
        state.previous = current
        return signal

    def decide(self, state: TeaState, step, read: Read) -> Decision:
        change = ratio(*read.inside)
        accumulated = state.accumulated + (
            self.polynomial(change) if math.isfinite(change) else math.inf
        )
        return reuse_or_base(accumulated < self.threshold, accumulated)

    def after_call(self, state: TeaState, step, decision: Decision) -> None:
        state.accumulated = 0.0 if decision.compute else decision.base_signal

    def run_block(self, state: TeaState, call: BlockCall, decision: Decision) -> Streams:
        return state.stack.run_block(call, decision, self.stream, keep=not self.signal_only)
