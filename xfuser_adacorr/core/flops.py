"""Counting the floating-point operations of a call, exactly, on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


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
