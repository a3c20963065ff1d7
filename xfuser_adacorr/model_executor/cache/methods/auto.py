"""Auto: AdaCorrection's own refresh rule, with no base method below it.

The offset estimation (`..correction.adacorrection`) decides alone, before the transformer is
entered; there is no signal inside the stack, so this method never objects to a reuse.
"""

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict


class Auto(BaseMethod):
    """Agree to every reuse and leave the decision to the correction weight w."""

    def __init__(self, config, family, transformer, *, signal_only: bool) -> None:
        self.family = family
        self.signal_only = signal_only

    def new_state(self) -> None:
        return None

    def probe(self, state: None, call: BlockCall) -> Signal:
        return Signal()

    def verdict(self, state: None, sums: list[float], local: list[float]) -> Verdict:
        return Verdict(True, None)

    def settle(self, state: None, verdict: Verdict | None, refreshed: bool) -> None:
        pass

    def run_block(self, state: None, call: BlockCall, verdict: Verdict | None) -> Streams:
        return call.run()
