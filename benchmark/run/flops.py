"""Floating-point operations that denoisers really execute, whoever decides about them.

Counted are matrix products, convolutions and attention, as PyTorch carries them out: what a cache
skips inside a block, a module or the whole call is not there to be counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")
"""What pipelines call them."""


def _cpu_attention_flops(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# The counter knows the attention kernels of accelerators, but not the one of the CPU.
_EXTRA_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """Run ``function`` and return its result and the FLOPs of its matmuls, convs and attentions.

    Compiled code runs uncompiled here, since the counter cannot see into it.
    """
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=_EXTRA_FORMULAS) as counter,
    ):
        result = function(*args, **kwargs)
    return result, counter.get_total_flops()


def denoisers(pipe: Any) -> list[nn.Module]:
    """The modules that a pipeline calls between two steps of its scheduler."""
    found = [getattr(pipe, name, None) for name in DENOISERS]
    return [module for module in found if isinstance(module, nn.Module)]


@dataclass(slots=True)
class Flops:
    """What was executed so far."""

    total: int = 0


class _Counting(TorchFunctionMode):
    """Adds up the FLOPs of PyTorch's functions, each measured the first time that it is called.

    A function without FLOPs at its first call is taken to have none; the FLOPs of another one are
    kept by the shapes it is given. Measuring every call (`FlopCounterMode`) takes several times as
    long as a small model itself.
    """

    def __init__(self, flops: Flops) -> None:
        super().__init__()
        self.flops = flops
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
def counted_flops(modules: Sequence[nn.Module]) -> Iterator[Flops]:
    """Within, the calls of ``modules`` add to the `Flops` that this gives.

    It is to be entered before a cache is enabled, and left after it is disabled.
    """
    flops = Flops()
    mode = _Counting(flops)

    def enter_call(*_: Any) -> None:
        mode.__enter__()

    def leave_call(*_: Any) -> None:
        mode.__exit__(None, None, None)

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter_call, prepend=True))
        handles.append(module.register_forward_hook(leave_call, always_call=True))
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
