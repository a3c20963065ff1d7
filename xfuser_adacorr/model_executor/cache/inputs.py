"""What a denoiser was called with, and whether an earlier answer still fits."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .messages import warn_once

STANDS_ASIDE = (
    "the model's output requires gradients: the cache stands aside and computes every step; sample "
    "under torch.no_grad() to use it"
)


class Inputs:
    """What a denoiser was called with, as far as it tells whether an earlier answer fits."""

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        described = [_described(leaf) for leaf in leaves]
        self.layout = (spec, tuple(layout for layout, _ in described))
        self._identities = [identity for _, identity in described]
        self._constant: list[bool] | None = None
        """Of each leaf, whether it has been the same object so far; None after one call."""

    def follows(self, before: "Inputs") -> bool:
        """Whether all that stayed the same so far still does; learns from ``before``."""
        if self.layout != before.layout:
            return False
        pairs = zip(before._identities, self._identities, strict=True)
        same = [_same(a, b) for a, b in pairs]
        if before._constant is None:
            self._constant = same
            return True
        changed = any(was and not now for was, now in zip(before._constant, same, strict=True))
        self._constant = None if changed else before._constant  # to be learned anew
        return not changed


def equal_inputs(before: Any, now: Any) -> bool:
    """Whether two trees of arguments hold the same values; tensors that are not the same objects
    are read."""
    ours, spec = pytree.tree_flatten(now)
    theirs, other = pytree.tree_flatten(before)
    return spec == other and all(
        a is b
        or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _described(leaf: Any) -> tuple[Any, Any]:
    """What has to stay for an earlier answer to fit, and what tells whether it is the same."""
    if isinstance(leaf, Tensor):
        base = leaf if leaf._base is None else leaf._base  # of views, which are made anew
        version = None if leaf.is_inference() else leaf._version
        identity = (weakref.ref(base), leaf.storage_offset(), version)
        return (tuple(leaf.shape), leaf.dtype, leaf.device), identity
    value = leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf)
    return value, leaf if isinstance(leaf, (int, float)) else type(leaf)


def _same(a: Any, b: Any) -> bool:
    """A tensor has one weak reference while that lives, and comparing two compares values."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] is b[0] and a[1:] == b[1:]
    return a == b


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
