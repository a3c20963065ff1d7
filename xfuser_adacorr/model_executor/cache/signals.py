"""Cheap signals that decisions are made from, as fp32 sums, and where they reach the host.

Every change is returned as a numerator and a denominator *sum* over the local tokens. Sums, unlike
ratios, can be added up over ranks that hold different tokens, and they are divided on the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .messages import warn_once
from .ranks import DecisionScope


@dataclass(frozen=True, slots=True)
class Signal:
    """Scalars to be read on the host before the decision, in one packed vector."""

    inside: Sequence[Tensor] = ()
    """Sums over this rank's own tokens, added up over the ranks that share the sample."""
    outside: Sequence[Tensor] = ()
    """Sums over the latents, added up only where ranks hold parts of them."""
    local: Sequence[Tensor] = ()
    """This rank's own."""

    def __add__(self, other: "Signal") -> "Signal":
        return Signal(
            [*self.inside, *other.inside],
            [*self.outside, *other.outside],
            [*self.local, *other.local],
        )


@dataclass(frozen=True, slots=True)
class Read:
    """The values of a `Signal`."""

    inside: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)


def read(signals: Sequence[Signal], scope: DecisionScope) -> list[Read]:
    """The values of the signals: one reduction over ranks, one transfer to the host.

    ``inside`` sums are added up over ranks, ``outside`` ones where the latents are split; what is
    ``local``, or equal on every rank, is not. Raises `ValueError` for too many sums.
    """
    kinds = ("inside", "outside", "local")
    summed = kinds[: 2 if scope.latents_are_split else 1]
    parts = [(kind, i) for kind in kinds for i in range(len(signals))]
    scalars = [x for kind, i in parts for x in getattr(signals[i], kind)]
    if not scalars:
        return [Read() for _ in signals]
    vector = torch.stack([x.detach().to(scalars[0].device, torch.float32) for x in scalars])
    if scope.group is not None:
        count = sum(len(getattr(one, kind)) for kind in summed for one in signals)
        scope.add_up(vector[:count])
    values = iter(vector.tolist())
    reads = [Read() for _ in signals]
    for kind, i in parts:
        getattr(reads[i], kind).extend(next(values) for _ in getattr(signals[i], kind))
    return reads


def l1_sums(x: Tensor, reference: Tensor) -> list[Tensor]:
    """Return ``[sum |x - reference|, sum |reference|]`` (scalars, float32).

    Their ratio is the relative L1 change of TeaCache (arXiv 2411.19108, eq. 4) and FBCache.
    """
    x, reference = x.float(), reference.float()
    return [(x - reference).abs().sum(), reference.abs().sum()]


def l2_sums(x: Tensor, reference: Tensor) -> list[Tensor]:
    """Return ``[||x - reference||^2, ||reference||^2]`` (scalars, float32)."""
    x, reference = x.float(), reference.float()
    return [(x - reference).square().sum(), reference.square().sum()]


def motion_sums(x: Tensor, num_frames: int) -> list[Tensor]:
    """Return ``[sum |x[t+1] - x[t]|, sum (|x[t+1]| + |x[t]|)]`` over frames t (scalars, float32).

    x is ``[B, T*S, D]``, ordered (T, S), with T = ``num_frames`` of at least 2. The ratio is the
    motion of AdaCache's Motion Regularization (arXiv 2411.02397, 3.3). S may be a share of every
    frame's tokens: the sums of all shares add up to those of the whole.
    """
    frames = x.float().unflatten(1, (num_frames, -1))
    later, earlier = frames[:, 1:], frames[:, :-1]
    return [(later - earlier).abs().sum(), later.abs().sum() + earlier.abs().sum()]


def token_std_sum(x: Tensor) -> Tensor:
    """Sum over samples and tokens of the standard deviation over channels, for x ``[B, N, C]``.

    The spatial statistic of AdaCorrection's Offset Estimation Module; population deviation.
    """
    return x.float().std(dim=-1, unbiased=False).sum()


def ratio(numerator: float, denominator: float) -> float:
    """Relative change from its two sums.

    Infinite if something grew out of exactly nothing, and where a sum is not finite, so that
    nothing is reused on the strength of it.
    """
    if not (math.isfinite(numerator) and math.isfinite(denominator)):
        warn_once(
            "a signal is not finite (NaN or Inf in the latents or in the model): nothing is reused "
            "on the strength of it"
        )
        return math.inf
    if denominator > 0.0:
        return numerator / denominator
    return math.inf if numerator > 0.0 else 0.0
