"""PipeFusion: each stage holds some of the blocks and is called once per step and patch.

The first stage decides, from its own blocks' signal and the latents' drift; the decision goes along
the pipeline from stage to stage, and every stage reuses its own blocks under it. With AdaCorrection
the last stage forecasts the output, and tells the first what its refreshes found. `Fast` alone
decides block by block, which each stage can do for itself.
"""

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily
from xfuser_adacorr.model_executor.cache.methods.base import (
    BlockCall,
    Decision,
    Signal,
    StackMethod,
    Streams,
)
from xfuser_adacorr.model_executor.cache.methods.residual import StackResidual
from xfuser_adacorr.model_executor.cache.ranks import RankMismatchError
from xfuser_adacorr.model_executor.cache.step import Step

from .outbox import outbox_of

PIPEFUSION_METHODS = ("Fb", "Tea", "Fast", "Auto")
FOLLOWED_METHODS = ("Fb", "Tea")
"""Methods with one decision for all blocks, made by the first stage; with AdaCorrection all are."""

REFRESH, REUSE, FAILURE = range(3)
"""What the first stage tells the others about a call."""

_tickets = count(1)


class PipelineStage:
    """This rank's place among the stages, and what decisions send along them.

    Two messages, through the host's memory: a decision is needed there, and the device's streams
    hold the activations. `pass_on` goes to the next stage for every call (24 bytes), `send_found`
    from the last stage to the first for refreshed calls (24 bytes). A found offset that nobody has
    asked for, of a run that was interrupted or before the latents were split into patches, is
    skipped by its ticket.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        """xfuser's ``PipelineGroupCoordinator``."""
        self.ticket = 0
        """Of the present call; the first stage never gives one out twice."""

    @property
    def is_first(self) -> bool:
        return self._group.is_first_rank

    @property
    def is_last(self) -> bool:
        return self._group.is_last_rank

    @property
    def patch(self) -> str:
        """Which part of the latents a call is about: whole while warming up, then patch by patch.

        Each has a state of its own.
        """
        state = _runtime_state()
        return f"#{state.pipeline_patch_idx}" if state.patch_mode else ""

    @property
    def first_step(self) -> int:
        """Step of the first call about this part of the latents."""
        state = _runtime_state()
        return state.runtime_config.warmup_steps if state.patch_mode else 0

    def ends_warmup(self, step: Step) -> bool:
        """Whether the latents are whole for the last time, and patches come next."""
        state = _runtime_state()
        is_last = step.index == state.runtime_config.warmup_steps - 1
        return is_last and step.remaining > 1 and not state.patch_mode

    # -- decisions -------------------------------------------------------------------------------

    def pass_on(self, decision: Decision) -> None:
        """Send what was decided to the next stage, if there is one."""
        if self.is_first:
            self.ticket = next(_tickets)
        signal = math.nan if decision.base_signal is None else decision.base_signal
        self._tell(REFRESH if decision.compute else REUSE, signal)

    def pass_on_failure(self, message: str, streams: Streams, family: ModelFamily) -> None:
        """Have all later stages raise `RankMismatchError` too; ``streams`` are of a block here.

        They listen once they are called, and xfuser calls them when it has received activations.
        """
        if self.is_last:
            return
        text = torch.frombuffer(bytearray(message.encode()), dtype=torch.uint8)
        self._tell(FAILURE, float(len(text)))
        self._send(text, self._group.next_rank)
        others = [x for name, x in streams.items() if name != family.output_stream]
        self._send_activations(streams[family.output_stream], others)

    def receive(self) -> Decision:
        """What the stage before this one was told, or decided."""
        ticket, outcome, signal = self._receive(torch.empty(3, dtype=torch.float64)).tolist()
        self.ticket = int(ticket)
        if outcome == FAILURE:
            text = self._receive(torch.empty(int(signal), dtype=torch.uint8))
            raise RankMismatchError(bytes(text.tolist()).decode())
        known = None if math.isnan(signal) else signal
        reuse = outcome == REUSE
        return Decision(not reuse, "reuse" if reuse else "stage", base_signal=known)

    # -- found offsets ---------------------------------------------------------------------------

    def send_found(self, sums: Sequence[float]) -> None:
        """Send the first stage two sums about the present call."""
        message = torch.tensor([self.ticket, *sums], dtype=torch.float64)
        self._send(message, self._group.next_rank)  # stages are in a ring

    def receive_found(self, ticket: int) -> list[float]:
        """The two sums about the call of this ticket; what was sent before it is skipped."""
        while True:
            found, *sums = self._receive(torch.empty(3, dtype=torch.float64)).tolist()
            if found == ticket:
                return sums

    # -- messages --------------------------------------------------------------------------------

    def _tell(self, outcome: int, signal: float) -> None:
        if not self.is_last:
            message = torch.tensor([self.ticket, outcome, signal], dtype=torch.float64)
            self._send(message, self._group.next_rank)

    def _send(self, message: Tensor, rank: int) -> None:
        work = torch.distributed.isend(message, dst=rank, group=self._group.cpu_group)
        outbox_of(self._group).keep(work, message)

    def _receive(self, message: Tensor) -> Tensor:
        torch.distributed.recv(message, src=self._group.prev_rank, group=self._group.cpu_group)
        return message

    def _send_activations(self, hidden: Tensor, others: Sequence[Tensor]) -> None:
        """Send what xfuser's pipelines do after a call, in their order and by their names."""
        state = _runtime_state()
        if not state.patch_mode:
            self._group.pipeline_send(hidden)
            for x in others:
                self._group.pipeline_send(x, name="encoder_hidden_state")
            return
        for x in others if state.pipeline_patch_idx == 0 else ():
            self._group.pipeline_isend(x, name="encoder_hidden_states")
        self._group.pipeline_isend(hidden, segment_idx=state.pipeline_patch_idx)


def _runtime_state() -> Any:
    from xfuser.core.distributed import get_runtime_state

    return get_runtime_state()


class Followed(StackMethod):
    """Reuses a later stage's blocks when the first stage says so: ``h + R`` of this stage."""

    forces_last = False

    def __init__(self, stream: str) -> None:
        self.stream = stream

    def new_state(self) -> StackResidual:
        return StackResidual()

    def measure(self, state: StackResidual, call: BlockCall) -> Signal:
        return Signal()

    def run_block(self, state: StackResidual, call: BlockCall, decision: Decision) -> Streams:
        return state.run_block(call, decision, self.stream, keep=not self.signal_only)
