"""Which processes a decision belongs to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce, get_world_size

MAX_REDUCED_SUMS = 16
"""Float32 sums that one decision may add up over ranks: a message of 64 bytes."""
RANK_TOLERANCE = 1e-3
"""Relative difference up to which ranks are taken to have measured the same."""


class RankMismatchError(RuntimeError):
    """Ranks that must take the same decision did not; raised on all of them alike."""


@dataclass(frozen=True, slots=True)
class DecisionScope:
    """The ranks that have to take the same decision.

    Ranks that hold different tokens, or different branches, of one sample must agree before a block
    is skipped, or their collectives hang. What a rank measures inside the stack covers its own
    tokens, so such sums are added up over ``group`` before anything is divided. The latents and the
    output are usually whole on every rank, since transformers split inside their forward: what is
    measured on them needs no communication. Data-parallel replicas share nothing.
    """

    group: ProcessGroup | None = None
    """Ranks that share a sample; None if this process sees all of it."""
    latents_are_split: bool = False
    """Whether each rank is given, and returns, its own part of the latents."""
    check_ranks: bool = False
    """Compare the decisions of all ranks in every call (one more message of 48 bytes)."""

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed ProcessGroup or None, got {self.group!r}"
            )

    @property
    def is_parallel(self) -> bool:
        return self.group is not None

    def add_up(self, sums: Tensor) -> None:
        """Add up a vector over the ranks, in place; `ValueError` for too many sums."""
        if len(sums) > MAX_REDUCED_SUMS:
            raise ValueError(
                f"a decision may reduce at most {MAX_REDUCED_SUMS} sums over ranks, got {len(sums)}"
            )
        if len(sums):
            all_reduce(sums, group=self.group)

    def summed(self, sums: Tensor) -> Tensor:
        """Add up, over the ranks that hold parts of the output, a vector that stays on the device.

        The vector itself where every rank has the whole output.
        """
        if self.group is not None and self.latents_are_split:
            self.add_up(sums)
        return sums

    def check(
        self,
        step: int,
        refreshed: bool,
        digest: int,
        signals: Sequence[float | None],
        device: torch.device,
    ) -> None:
        """Raise `RankMismatchError` on every rank if one decided or measured differently.

        ``digest`` stands for all of the decision, ``signals`` (3 at most) for what it was taken
        from. Nothing is done unless ``check_ranks``.
        """
        if not self.check_ranks or self.group is None:
            return
        numbers = [math.nan if value is None else value for value in signals]
        row = torch.tensor([step, refreshed, digest, *numbers], dtype=torch.float64, device=device)
        rows = [torch.empty_like(row) for _ in range(get_world_size(self.group))]
        all_gather(rows, row, group=self.group)
        table = torch.stack(rows).cpu()
        same = torch.isclose(table, table[:1], rtol=RANK_TOLERANCE, atol=0.0, equal_nan=True)
        same[:, :3] = table[:, :3] == table[:1, :3]
        if not same.all():
            raise RankMismatchError(
                "ranks that share a sample decided or measured differently; "
                + "; ".join(_describe(rank, row) for rank, row in enumerate(table.tolist()))
            )


def _describe(rank: int, row: list[float]) -> str:
    step, refreshed, _, *signals = row
    measured = ", ".join(f"{value:.6g}" for value in signals if not math.isnan(value))
    return (
        f"rank {rank} of the group: step {step:.0f}, {'refresh' if refreshed else 'reuse'}"
        f" ({measured or 'nothing measured'})"
    )
