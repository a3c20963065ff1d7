"""Splitting the tokens of a frame over ranks, and exchanging them for attention heads (Ulysses).

Shares may differ by one token, so nothing is padded: attention needs no mask, and sums over tokens
are exact. Shapes as in `blocks`; s is this rank's share of the S tokens of a frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single, get_rank, get_world_size


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """The ranks that share each frame's tokens."""

    group: ProcessGroup

    @property
    def size(self) -> int:
        return get_world_size(self.group)

    def share(self, num_tokens: int) -> "TokenShare":
        """How ``num_tokens`` (S) are shared out; `ValueError` if there are fewer than ranks."""
        size = self.size
        if num_tokens < size:
            raise ValueError(
                f"a frame must have at least one token for each of the {size} ranks, "
                f"got {num_tokens}"
            )
        smaller, larger = divmod(num_tokens, size)
        counts = [smaller + (rank < larger) for rank in range(size)]
        return TokenShare(self.group, counts, get_rank(self.group))


@dataclass(frozen=True, slots=True)
class TokenShare:
    """How the tokens of a frame are shared out in one forward."""

    group: ProcessGroup
    counts: list[int]
    """Tokens of each rank."""
    rank: int

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, T, S, C]``, equal on all ranks -> this rank's ``[B, T, s, C]``."""
        return tokens.split(self.counts, dim=2)[self.rank]

    def gather(self, tokens: Tensor) -> Tensor:
        """This rank's ``[B, T, s, C]`` -> all tokens ``[B, T, S, C]`` on every rank."""
        first = tokens.movedim(2, 0).contiguous()  # [s, B, T, C]
        copies = first.repeat(len(self.counts), 1, 1, 1)
        everything = first.new_empty(sum(self.counts), *first.shape[1:])
        sent = [first.shape[0]] * len(self.counts)
        all_to_all_single(everything, copies, self.counts, sent, group=self.group)
        return everything.movedim(0, 2)

    def tokens_to_heads(self, x: Tensor) -> Tensor:
        """All heads of own tokens ``[N, H, s, D]`` -> own of all tokens ``[N, H/n, S, D]``."""
        size, own = len(self.counts), self.counts[self.rank]
        heads = x.shape[1] // size
        parts = x.unflatten(1, (size, heads)).permute(1, 3, 0, 2, 4)  # [n, s, N, H/n, D]
        sent = parts.flatten(0, 1).contiguous()
        received = sent.new_empty(sum(self.counts), *sent.shape[1:])
        all_to_all_single(received, sent, self.counts, [own] * size, group=self.group)
        return received.permute(1, 2, 0, 3)

    def heads_to_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `tokens_to_heads`."""
        size, own = len(self.counts), self.counts[self.rank]
        sent = x.permute(2, 0, 1, 3).contiguous()  # [S, N, H/n, D]
        received = sent.new_empty(size * own, *sent.shape[1:])
        all_to_all_single(received, sent, [own] * size, self.counts, group=self.group)
        parts = received.unflatten(0, (size, own))  # [n, s, N, H/n, D]
        return parts.permute(2, 0, 3, 1, 4).flatten(1, 2)


def check_heads(num_heads: int, group: ProcessGroup) -> None:
    """Raise `ValueError` unless the heads can be shared out evenly."""
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a torch.distributed ProcessGroup, got {group!r}")
    size = torch.distributed.get_world_size(group)
    if size < 1 or num_heads % size:
        raise ValueError(
            f"group must be one of this rank's, of a size that divides num_heads={num_heads}; "
            f"got {size} ranks"
        )
