"""What a denoiser is called with: whether values differ, and whether gradients are recorded."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .messages import warn_once

STANDS_ASIDE = (
    "the model's output requires gradients: the cache stands aside and computes every step; sample "
    "under torch.no_grad() to use it"
)


def same_conditioning(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two calls are given the same values, but for numbers that may belong to a step.

    These are Python numbers and tensors of floats with one axis at most: another timestep, a noise
    level. Tensors that are not the same objects are read.
    """
    ours, spec = pytree.tree_flatten(now)
    theirs, other = pytree.tree_flatten(before)
    return spec == other and all(map(_agree, theirs, ours))


def _agree(a: Any, b: Any) -> bool:
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, Tensor):
        number = a.ndim <= 1 and a.shape == b.shape and a.is_floating_point()
        return number or torch.equal(a, b)
    return isinstance(a, (int, float)) or (isinstance(a, Hashable) and a == b)


def records_gradients(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model records gradients: the cache has to stand aside, once said.

    Blocks that run through a cache would not be recomputed alike under gradient checkpointing, and
    what is reused has no gradients, or those of another call.
    """
    if not torch.is_grad_enabled():
        return False
    recorded = requires_grad((args, kwargs)) or any(p.requires_grad for p in model.parameters())
    if recorded:
        warn_once(STANDS_ASIDE)
    return recorded


def requires_grad(output: Any) -> bool:
    """Whether gradients are recorded for a tensor in ``output``."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(output))
