"""What stands in for a whole stack of blocks: its input plus the last computed residual."""

from dataclasses import dataclass

from torch import Tensor

from .base import BlockCall, Decision, Streams


@dataclass(slots=True)
class StackResidual:
    """``h + R``, with R the stack's output minus its input at the last computed call."""

    residual: Tensor | None = None
    """``[B, N, D]``"""
    stack_input: Tensor | None = None

    def run_block(self, call: BlockCall, decision: Decision, stream: str, keep: bool) -> Streams:
        """Run the block, or pass it by and add R after the last one; R is stored if ``keep``."""
        if call.is_first:
            self.stack_input = call.streams[stream]
        out = call.run() if decision.compute else call.streams
        if call.is_last:
            if not decision.compute:
                out = {**out, stream: self.stack_input + self.residual}
            elif keep:
                self.residual = out[stream] - self.stack_input
            self.stack_input = None
        return out
