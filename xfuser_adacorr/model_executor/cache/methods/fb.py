"""FBCache: the first block's residual tells whether the rest of the stack changed."""

from dataclasses import dataclass

from torch import Tensor

from xfuser_adacorr.core.signals import l1_sums, ratio

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict


@dataclass(slots=True)
class FbState:
    reference: Tensor | None = None
    """First-block residual of the last computed call ``[B, N, D]``."""
    residual: Tensor | None = None
    """Stack output minus first-block output of the last computed call ``[B, N, D]``."""
    current: Tensor | None = None
    after_first: Tensor | None = None


class Fb(BaseMethod):
    """Skip iff ``mean|r - r_ref| / mean|r_ref| < rel_l1_thresh`` with ``r = B0(h) - h``.

    ``r_ref`` is written on computed calls only. A hit returns ``B0(h) + R``, where R is the
    residual of the blocks after the first. No forced last call. Source: ParaAttention's first
    block cache.
    """

    forces_last = False

    def new_state(self) -> FbState:
        return FbState()

    def probe(self, state: FbState, call: BlockCall) -> Signal:
        stream = self.family.output_stream
        state.current = call.run()[stream] - call.streams[stream]
        if state.reference is None:
            return Signal()
        return Signal(l1_sums(state.current, state.reference))

    def verdict(self, state: FbState, sums: list[float], local: list[float]) -> Verdict:
        change = ratio(*sums)
        return Verdict(change < self.threshold, change)

    def settle(self, state: FbState, verdict: Verdict | None, refreshed: bool) -> None:
        if refreshed:
            state.reference = state.current
        state.current = None

    def run_block(self, state: FbState, call: BlockCall, verdict: Verdict | None) -> Streams:
        stream = self.family.output_stream
        if call.is_first:
            out = call.run()
            state.after_first = out[stream]
            return out
        out = call.run() if verdict is None else call.streams
        if call.is_last:
            if verdict is not None:
                out = {**out, stream: state.after_first + state.residual}
            elif not self.signal_only:
                state.residual = out[stream] - state.after_first
            state.after_first = None
        return out
