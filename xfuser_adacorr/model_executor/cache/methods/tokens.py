"""What methods on the tokens of a module share: which models they can act on, and their grid."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .options import check_count

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.sites.modules import Place

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
CELL = 2
"""Side of the cells of tokens that compare with each other."""


def check_plain(model: nn.Module, places: Sequence["Place"], method: str) -> None:
    """Raise `ValueError` for attention that is more than queries, keys and values of one sequence:
    with rotary positions or two streams a token cannot be cut out."""
    for place in places:
        module = place.module
        if place.kind != "attention":
            continue
        processor = type(getattr(module, "processor", None)).__name__
        if not hasattr(module, "to_k") or processor not in PROCESSORS:
            raise ValueError(
                f"{method} needs diffusers' plain Attention ({', '.join(PROCESSORS)}); "
                f"{type(model).__name__}.{place.name} is {type(module).__name__} with {processor}; "
                "use FORA, L2C or Lazy"
            )


def is_self_attention(call: Any) -> bool:
    return call.place.kind == "attention" and call.context is None


def projected(attention: nn.Module, layer: str, hidden: Tensor) -> Tensor:
    """Queries (``to_q``) or keys (``to_k``) ``[B, heads, N, d]`` of tokens ``[B, N, D]``."""
    x = getattr(attention, layer)(hidden).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    norm = getattr(attention, f"norm_{layer[-1]}", None)
    return x if norm is None else norm(x)


def grid_of(tokens: int, given: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width; `ValueError` where the tokens are no such grid, or no even one."""
    side = math.isqrt(tokens)
    height, width = given or (side, side)
    if height * width != tokens or height % CELL or width % CELL:
        raise ValueError(
            f"grid must be the (even) height and width of {tokens} tokens, got "
            f"{given or 'None, which is a square'}"
        )
    return height, width


def in_cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B, N]`` -> ``[B, cells, 4]``: the values of every cell of 2x2 tokens."""
    height, width = grid
    x = x.view(-1, height // CELL, CELL, width // CELL, CELL)
    return x.transpose(2, 3).reshape(x.shape[0], -1, CELL * CELL)


def out_of_cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `in_cells`."""
    height, width = grid
    x = x.view(-1, height // CELL, width // CELL, CELL, CELL)
    return x.transpose(2, 3).reshape(x.shape[0], -1)


def checked_grid(grid: Any) -> tuple[int, int] | None:
    """The option as a tuple; `TypeError` for what is no grid."""
    if grid is None:
        return None
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2):
        raise TypeError(f"grid must be (height, width) in tokens, or None, got {grid!r}")
    for side in grid:
        check_count("grid", side, least=CELL)
    return tuple(grid)


def taken_tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """Tokens ``[B, n, D]`` of ``[B, N, D]`` at the indices ``[B, n]``."""
    return torch.gather(x, 1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
