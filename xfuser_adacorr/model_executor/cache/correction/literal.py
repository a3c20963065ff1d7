"""AdaCorrection as published: a per-layer blend with every fresh block computed.

For study and tests; it saves no compute. With the absolute score of the paper gamma = lambda = 1
saturates on most models, so the blend is then close to the fresh output.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from xfuser_adacorr.core.blend import blend
from xfuser_adacorr.core.signals import token_std_sum
from xfuser_adacorr.model_executor.cache.context import CallRecord
from xfuser_adacorr.model_executor.cache.methods.base import BlockCall, Streams


@dataclass(slots=True)
class LiteralState:
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Each block's input at the last call ``[B, N, D]``."""
    outputs: dict[int, Streams] = field(default_factory=dict)
    """Each block's blended output at the last call."""
    unread: list[Tensor] = field(default_factory=list)
    """The last call's weight of each block, to be read with the next decision."""
    unread_record: CallRecord | None = None


def literal_weight(hidden: Tensor, previous: Tensor, gamma: float, lambda_: float) -> Tensor:
    """``w = clip(gamma * (Dt^2 + lambda * Ds), 0, 1)`` as a scalar tensor, for ``[B, N, D]``.

    ``Dt``: mean over tokens of ``||h_t - h_(t-1)||``; ``Ds``: mean over tokens of the standard
    deviation over channels of ``h_t`` (AdaCorrection, Algorithm 1).
    """
    temporal = (hidden.float() - previous.float()).norm(dim=-1).mean()
    spatial = token_std_sum(hidden) / (hidden.shape[0] * hidden.shape[1])
    return (gamma * (temporal.square() + lambda_ * spatial)).clamp(0.0, 1.0)


def _blended(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """The blend in at least float32: in half precision that of two equals would not be equal."""
    wide = torch.promote_types(fresh.dtype, torch.float32)
    return blend(cached.to(wide), fresh.to(wide), weight).to(fresh.dtype)


class LiteralCorrection:
    """``h^ = (1 - w) * cached + w * fresh`` per block; the blend is what the cache keeps."""

    def __init__(self, *, gamma: float, lambda_: float, stream: str) -> None:
        self.gamma = gamma
        self.lambda_ = lambda_
        self.stream = stream

    def new_state(self) -> LiteralState:
        return LiteralState()

    def unread(self, state: LiteralState) -> list[Tensor]:
        """Scalars to be read with the next decision."""
        return state.unread

    def learn(self, state: LiteralState, weights: list[float]) -> None:
        """Note the mean weight over the blocks of the last call in its record."""
        state.unread_record.weight = sum(weights) / len(weights)
        state.unread, state.unread_record = [], None

    def blend_block(
        self, state: LiteralState, call: BlockCall, fresh: Streams, record: CallRecord
    ) -> Streams:
        """Return the block's output; blended where the base method would have reused."""
        hidden, out = call.streams[self.stream], fresh
        if not record.refreshed:
            weight = literal_weight(hidden, state.inputs[call.index], self.gamma, self.lambda_)
            cached = state.outputs[call.index]
            out = {name: _blended(cached[name], x, weight) for name, x in fresh.items()}
            state.unread.append(weight)
            state.unread_record = record
        state.inputs[call.index] = hidden.clone()
        state.outputs[call.index] = {name: x.clone() for name, x in out.items()}
        return out
