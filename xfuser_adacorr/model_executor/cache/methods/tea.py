"""TeaCache: the modulated input of the first block, through a polynomial, accumulated."""

from dataclasses import dataclass

from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.signals import l1_sums, ratio
from xfuser_adacorr.model_executor.cache.calibration import load_tea_polynomial
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import (
    ModelFamily,
    TeaPolynomial,
    config_of,
)

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict

IDENTITY = TeaPolynomial(coefficients=(1.0, 0.0))


@dataclass(slots=True)
class TeaState:
    previous: Tensor | None = None
    """Modulated input of the last call, computed or not ``[B, N, D]``."""
    accumulated: float = 0.0
    residual: Tensor | None = None
    """Stack output minus stack input of the last computed call ``[B, N, D]``."""
    stack_input: Tensor | None = None


class Tea(BaseMethod):
    """Skip iff ``a < rel_l1_thresh``, where ``a += p(mean|F - F_prev| / mean|F_prev|)``.

    F is the modulated input of the first block, ``F_prev`` that of the last call seen; a is zeroed
    on computed calls; increments are clamped at 0 and p's input to its fit range. A hit returns
    ``h + R`` with the whole stack's residual. The first and the last call are computed.
    Source: Liu et al., Timestep Embedding Tells (arXiv 2411.19108).
    """

    def __init__(
        self, config: CacheConfig, family: ModelFamily, transformer: nn.Module, *, signal_only: bool
    ) -> None:
        super().__init__(config, family, transformer, signal_only=signal_only)
        calibrated = load_tea_polynomial(transformer, config.calibration)
        published = family.published_polynomial(config_of(transformer))
        self.polynomial = calibrated or published or IDENTITY

    def new_state(self) -> TeaState:
        return TeaState()

    def probe(self, state: TeaState, call: BlockCall) -> Signal:
        current = self.family.modulated_input(call.block, call.arguments)
        signal = Signal() if state.previous is None else Signal(l1_sums(current, state.previous))
        state.previous = current
        return signal

    def verdict(self, state: TeaState, sums: list[float], local: list[float]) -> Verdict:
        accumulated = state.accumulated + self.polynomial(ratio(*sums))
        return Verdict(accumulated < self.threshold, accumulated)

    def settle(self, state: TeaState, verdict: Verdict | None, refreshed: bool) -> None:
        state.accumulated = 0.0 if refreshed else verdict.signal

    def run_block(self, state: TeaState, call: BlockCall, verdict: Verdict | None) -> Streams:
        stream = self.family.output_stream
        if call.is_first:
            state.stack_input = call.streams[stream]
        out = call.run() if verdict is None else call.streams
        if call.is_last:
            if verdict is not None:
                out = {**out, stream: state.stack_input + state.residual}
            elif not self.signal_only:
                state.residual = out[stream] - state.stack_input
            state.stack_input = None
        return out
