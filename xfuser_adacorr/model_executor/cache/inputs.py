"""What a denoiser was called with, and whether an earlier answer still fits."""

import weakref
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


class Inputs:
    """What a denoiser was called with, as far as it tells whether an earlier answer fits."""

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        leaves, spec = pytree.tree_flatten_with_path((args, dict(kwargs)))
        described = [(path, *_described(leaf)) for path, leaf in leaves]
        self.layout = (spec, tuple(layout for _, layout, _ in described))
        self._identities = {path: identity for path, _, identity in described}
        self._constant: dict[Any, bool] = {}
        """Of each leaf that was there in two calls, whether it was the same in the first two."""

    def follows(self, before: "Inputs") -> bool:
        """Whether all that stayed the same so far still does; learns from ``before``.

        What is new in the second call is taken to be new in every call. What is the same there has
        to stay, also where another leaf has changed, or its shape.
        """
        both = [path for path in self._identities if path in before._identities]
        same = {path: _same(before._identities[path], self._identities[path]) for path in both}
        self._constant = same | before._constant
        changed = any(self._constant[path] and not same[path] for path in both)
        return self.layout == before.layout and not changed


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
