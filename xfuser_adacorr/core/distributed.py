"""Which processes a decision belongs to, and the single place where it reaches the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


@dataclass(frozen=True, slots=True)
class DecisionScope:
    """The ranks that have to take the same decision.

    Ranks that hold different tokens of one sample must agree before a block is skipped, or their
    collectives hang. Sums are therefore added up over ``group`` before anything is divided.
    """

    group: ProcessGroup | None = None
    """Ranks that share a sample; None if this process sees all of it."""

    def read(self, sums: Sequence[Tensor], replicated: Sequence[Tensor] = ()) -> list[float]:
        """Return all scalars as floats: one reduction (of ``sums``) and one host synchronisation.

        ``replicated`` scalars (a timestep) are equal on every rank and not reduced.
        """
        if not sums and not replicated:
            return []
        device = (sums[0] if sums else replicated[0]).device
        vector = torch.stack([s.detach().to(device, torch.float32) for s in (*sums, *replicated)])
        if self.group is not None and sums:
            all_reduce(vector[: len(sums)], group=self.group)
        return vector.tolist()
