"""Floating-point operations that a transformer really executes, whoever decides about them.

Counted are matrix products, convolutions and attention, as PyTorch carries them out: what a cache
skips inside a block, a module or the whole call is not there to be counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xfuser_adacorr.core.flops import count_flops
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import find_family


@dataclass(slots=True)
class Flops:
    """What was executed so far."""

    total: int = 0
    """In the transformer's calls: embedders, blocks and head."""
    blocks: int = 0
    """In the transformer's blocks."""


class _Counting(TorchFunctionMode):
    """Adds up the FLOPs of PyTorch's functions, each measured the first time that it is called.

    A function without FLOPs at its first call is taken to have none; the FLOPs of another one are
    kept by the shapes it is given. Measuring every call (`FlopCounterMode`) takes several times as
    long as a small model itself.
    """

    def __init__(self, flops: Flops) -> None:
        super().__init__()
        self.flops = flops
        self.depth = 0
        """How many blocks the call is in."""
        self._free: set[Any] = set()
        self._known: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._free:
            return func(*args, **kwargs)
        key = (func, _shapes(args), _shapes(kwargs))
        if key in self._known:
            result = func(*args, **kwargs)
        else:
            result, self._known[key] = count_flops(func, *args, **kwargs)
            # einsum alone may have none for one equation, and some for another
            if not self._known[key] and func is not torch.einsum:
                self._free.add(func)
        self.flops.total += self._known[key]
        if self.depth:
            self.flops.blocks += self._known[key]
        return result


def _shapes(x: Any) -> Any:
    """What the FLOPs of a function depend on in its arguments, as a key."""
    if isinstance(x, Tensor):
        return x.shape
    if isinstance(x, dict):
        return tuple((name, _shapes(value)) for name, value in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(_shapes(value) for value in x)
    return repr(x)


@contextmanager
def counted_flops(transformer: nn.Module) -> Iterator[Flops]:
    """Within, the calls of ``transformer`` add to the `Flops` that this gives.

    It is to be entered before a cache is enabled, and left after it is disabled: the blocks are
    those that the transformer has on entry.
    """
    flops = Flops()
    mode = _Counting(flops)
    names = [part.attribute for part in find_family(transformer).block_lists]
    blocks = [block for name in names for block in getattr(transformer, name)]

    def enter_call(*_: Any) -> None:
        mode.__enter__()

    def leave_call(*_: Any) -> None:
        mode.__exit__(None, None, None)

    def move(by: int, *_: Any) -> None:
        mode.depth += by

    handles = [
        transformer.register_forward_pre_hook(enter_call, prepend=True),
        transformer.register_forward_hook(leave_call, always_call=True),
    ]
    for block in blocks:
        handles.append(block.register_forward_pre_hook(partial(move, 1)))
        handles.append(block.register_forward_hook(partial(move, -1), always_call=True))
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
