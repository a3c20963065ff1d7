"""FBCache: the first block's residual tells whether the rest of the stack changed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xfuser_adacorr.model_executor.cache.signals import l1_sums, ratio

from .base import BlockCall, Decision, Read, Signal, StackMethod, Streams, reuse_or_base
from .options import StackOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Fb(StackOptions):
    """Skip while the first block's residual changes by less than ``threshold``."""

    label: ClassVar[str] = "Fb"

    def stack_method(self, model, family) -> "FirstBlock":
        return FirstBlock(self.threshold_for(family), family.output_stream)


@dataclass(slots=True)
class FbState:
    reference: Tensor | None = None
    """First-block residual of the last computed call ``[B, N, D]``."""
    residual: Tensor | None = None
    """Stack output minus first-block output of the last computed call ``[B, N, D]``."""
    current: Tensor | None = None
    after_first: Tensor | None = None


class FirstBlock(StackMethod):
    """Skip iff ``mean|r - r_ref| / mean|r_ref| < threshold`` with ``r = B0(h) - h``.

    ``r_ref`` is written on computed calls only. A hit returns ``B0(h) + R``, where R is the
    residual of the blocks after the first. No forced last call. Source: ParaAttention's first
    block cache.
    """

    forces_last = False

    def __init__(self, threshold: float, stream: str) -> None:
        self.threshold, self.stream = threshold, stream

    def new_state(self) -> FbState:
        return FbState()

    def measure(self, state: FbState, call: BlockCall) -> Signal:
        state.current = call.run()[self.stream] - call.streams[self.stream]
        if state.reference is None:
            return Signal()
        return Signal(l1_sums(state.current, state.reference))

    def decide(self, state: FbState, step, read: Read) -> Decision:
        change = ratio(*read.inside)
        return reuse_or_base(change < self.threshold, change)

    def after_call(self, state: FbState, step, decision: Decision) -> None:
        if decision.compute:
            state.reference = state.current
        state.current = None

    def run_block(self, state: FbState, call: BlockCall, decision: Decision) -> Streams:
        stream = self.stream
        if call.is_first:
            out = call.run()
            state.after_first = out[stream]
        else:
            out = call.run() if decision.compute else call.streams
        if call.is_last:
            if not decision.compute:
                out = {**out, stream: state.after_first + state.residual}
            elif not self.signal_only:
                state.residual = out[stream] - state.after_first
            state.after_first = None
        return out
