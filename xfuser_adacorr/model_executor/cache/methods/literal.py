"""AdaCorrection as published: a per-layer blend with every fresh block computed.

For study and tests; it saves no compute. With the absolute score of the paper gamma = lambda = 1
saturates on most models, so the blend is then close to the fresh output.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.signals import token_std_sum
from xfuser_adacorr.model_executor.cache.step import Step

from .base import BlockCall, Decision, Read, Signal, StackMethod, Streams

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.trace import CallRecord


@dataclass(slots=True)
class LiteralState:
    inner: Any
    """State of the base method."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Each block's input at the last call ``[B, N, D]``."""
    outputs: dict[int, Streams] = field(default_factory=dict)
    """Each block's blended output at the last call."""
    weights: list[Tensor] = field(default_factory=list)
    """The last call's weight of each block."""
    record: "CallRecord | None" = None
    """Of the last call."""


def literal_weight(hidden: Tensor, previous: Tensor, gamma: float, lambda_: float) -> Tensor:
    """``w = clip(gamma * (Dt^2 + lambda * Ds), 0, 1)`` as a scalar tensor, for ``[B, N, D]``.

    ``Dt``: mean over tokens of ``||h_t - h_(t-1)||``; ``Ds``: mean over tokens of the standard
    deviation over channels of ``h_t`` (AdaCorrection, Algorithm 1).
    """
    temporal = (hidden.float() - previous.float()).norm(dim=-1).mean()
    spatial = token_std_sum(hidden) / (hidden.shape[0] * hidden.shape[1])
    return (gamma * (temporal.square() + lambda_ * spatial)).clamp(0.0, 1.0)


def _blended(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """``(1 - w) * cached + w * fresh`` in at least float32.

    In half precision the blend of two equals would not be equal.
    """
    wide = torch.promote_types(fresh.dtype, torch.float32)
    return ((1.0 - weight) * cached.to(wide) + weight * fresh.to(wide)).to(fresh.dtype)


class LiteralBlend(StackMethod):
    """``h^ = (1 - w) * cached + w * fresh`` per block where ``base`` would reuse.

    The blend is what the cache keeps. Every block is computed, so that a call counts as one.
    """

    def __init__(self, base: StackMethod, gamma: float, lambda_: float, family: Any) -> None:
        self.base, self.gamma, self.lambda_ = base, gamma, lambda_
        self.stream = family.output_stream
        self.forces_last = base.forces_last

    def new_state(self) -> LiteralState:
        return LiteralState(self.base.new_state())

    def measure(self, state: LiteralState, call: BlockCall) -> Signal:
        weights = [torch.stack(state.weights).mean()] if state.weights else []
        return self.base.measure(state.inner, call) + Signal(local=weights)

    def decide(self, state: LiteralState, step: Step, read: Read) -> Decision:
        if state.weights:
            state.record.weight = read.local.pop()
        return self.base.decide(state.inner, step, read)

    def follow(self, state: LiteralState, decision: Decision) -> None:
        self.base.follow(state.inner, decision)

    def noted(self, state: LiteralState, record: "CallRecord") -> None:
        state.record = record

    def after_call(self, state: LiteralState, step: Step, decision: Decision) -> None:
        state.weights = []
        self.base.after_call(state.inner, step, decision)

    def run_block(self, state: LiteralState, call: BlockCall, decision: Decision) -> Streams:
        hidden = call.streams[self.stream]
        out = self.base.run_block(state.inner, call, decision) if decision.compute else call.run()
        if not decision.compute:
            weight = literal_weight(hidden, state.inputs[call.index], self.gamma, self.lambda_)
            cached = state.outputs[call.index]
            out = {name: _blended(cached[name], x, weight) for name, x in out.items()}
            state.weights.append(weight)
        state.inputs[call.index] = hidden.clone()
        state.outputs[call.index] = {name: x.clone() for name, x in out.items()}
        return out
