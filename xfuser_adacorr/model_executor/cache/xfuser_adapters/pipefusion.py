"""PipeFusion: each stage holds some of the blocks and is called once per step and patch.

The first stage decides, from its own blocks' signal; the decision goes along the pipeline from
stage to stage as two numbers, and every stage reuses its own blocks under it. `Fast` decides block
by block, which each stage can do for itself.
"""

from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.methods.base import (
    BaseMethod,
    BlockCall,
    Signal,
    Streams,
    Verdict,
)
from xfuser_adacorr.model_executor.cache.methods.tea import Tea, TeaState

from .outbox import Outbox

PIPEFUSION_METHODS = ("Fb", "Tea", "Fast")
FOLLOWED_METHODS = ("Fb", "Tea")
"""Methods with one decision for all blocks, made by the first stage."""


class PipelineStage:
    """This rank's place among the stages, and the decision's way along them."""

    def __init__(self, group: Any) -> None:
        self._group = group
        """xfuser's ``PipelineGroupCoordinator``."""
        self._outbox = Outbox()

    @property
    def is_first(self) -> bool:
        return self._group.is_first_rank

    @property
    def patch(self) -> str:
        """Which part of the latents a call is about: whole while warming up, then patch by patch.

        Each has a state of its own.
        """
        from xfuser.core.distributed import get_runtime_state

        state = get_runtime_state()
        return f"#{state.pipeline_patch_idx}" if state.patch_mode else ""

    def pass_on(self, verdict: Verdict | None) -> None:
        """Send what was decided to the next stage, if there is one; None is a refresh."""
        if self._group.is_last_rank:
            return
        signal = 0.0 if verdict is None else verdict.signal
        message = torch.tensor([verdict is not None, signal], dtype=torch.float64)
        # Through the host: a decision is needed there, and device streams hold the activations.
        work = torch.distributed.isend(
            message, dst=self._group.next_rank, group=self._group.cpu_group
        )
        self._outbox.keep(work, message)

    def receive(self) -> Verdict | None:
        """What the stage before this one was told, or decided."""
        message = torch.empty(2, dtype=torch.float64)
        torch.distributed.recv(message, src=self._group.prev_rank, group=self._group.cpu_group)
        reuse, signal = message.tolist()
        return Verdict(True, signal) if reuse else None


class Follower(BaseMethod):
    """Reuses a later stage's blocks when the first stage says so: ``h + R`` of this stage."""

    def __init__(self, method: BaseMethod) -> None:
        self.family = method.family
        self.signal_only = False

    def new_state(self) -> TeaState:
        return TeaState()

    def probe(self, state: TeaState, call: BlockCall) -> Signal:
        return Signal()

    def verdict(self, state: TeaState, sums: list[float], local: list[float]) -> Verdict:
        raise RuntimeError("a later stage does not decide")

    def settle(self, state: TeaState, verdict: Verdict | None, refreshed: bool) -> None:
        pass

    def run_block(self, state: TeaState, call: BlockCall, verdict: Verdict | None) -> Streams:
        return Tea.run_block(self, state, call, verdict)


class StageClock:
    """Looks a call's timestep up in the schedule: only the last stage steps its scheduler."""

    needs_timestep = True
    schedule = None

    def __init__(self, get_scheduler) -> None:
        self._get_scheduler = get_scheduler
        self._made: Tensor | None = None
        self._timesteps: list[float] = []
        self._sigmas: list[float] = []

    @property
    def scheduler(self) -> Any:
        return self._get_scheduler()

    def run_began(self) -> bool:
        """True once for every ``set_timesteps``: it makes new tensors for each generation."""
        scheduler = self.scheduler
        if scheduler.timesteps is self._made:
            return False
        self._made = scheduler.timesteps
        self._timesteps, self._sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
        return True

    def locate(self, calls: int, timestep: float | None, last: Step | None) -> Step:
        whole = float(self.scheduler.config.num_train_timesteps)
        _, index = min(
            (abs(timestep * scale - t), index)
            for scale in (1.0, whole)  # some transformers are given the timestep's fraction
            for index, t in enumerate(self._timesteps)
        )
        remaining = len(self._timesteps) - index
        return Step(index, self._sigmas[index], self._sigmas[index + 1], remaining)

    def continues(self, last: Step, step: Step) -> bool:
        return step.index > last.index
