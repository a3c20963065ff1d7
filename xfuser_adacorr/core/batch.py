"""The rows of a batch that belong to one sample.

A batch holds its samples once, or several times one after the other, as classifier-free guidance
does: ``[uncond 0, uncond 1, ..., cond 0, cond 1, ...]``. Row r belongs to sample ``r mod samples``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_rows(x: Tensor, samples: int, index: int) -> Tensor:
    """Rows of one sample ``[B / samples, ...]`` of a batch ``[B, ...]``, as a view."""
    return x.unflatten(0, (-1, samples))[:, index]


def chosen_rows(x: Tensor, samples: int, indices: Sequence[int]) -> Tensor:
    """The batch of these samples alone, in the same arrangement."""
    return x.unflatten(0, (-1, samples))[:, list(indices)].flatten(0, 1)


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """The batch of all samples, from the rows of each: the inverse of `sample_rows`."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)


def repeats(x: Tensor, copies: int) -> Tensor:
    """Whether a batch holds equal rows ``copies`` times one after the other, a scalar (bool)."""
    first, *others = x.chunk(copies)
    return torch.stack([(first == other).all() for other in others]).all()
