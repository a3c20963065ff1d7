"""The modulated input of a block, found without knowing how the block modulates."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_ATTENTION = re.compile(r"Attn|Attention|^MultiHead", re.IGNORECASE)
_NAMES = ("attn", "attn1", "self_attn", "attention", "self_attention")
_NO_ATTENTION = re.compile(r"Norm|Processor|Block|Embed|Rotary|Identity|Linear$")


class _Reached(Exception):
    """The attention was entered with these tokens."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.hidden_states = hidden_states


def attentions(block: nn.Module) -> list[nn.Module]:
    """The attentions of a block, by their classes' names or their own; none inside another one."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for name, child in module.named_children():
            kind = type(child).__name__
            if name in _NAMES or (_ATTENTION.search(kind) and not _NO_ATTENTION.search(kind)):
                found.append(child)
            else:
                visit(child)

    visit(block)
    return found


def attention_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """What the first attention of ``block`` is given: its modulated input ``[B, N, D]``.

    The block's forward runs on ``arguments``, by name, until it enters an attention, and no
    further: it costs the norm and the modulation. Raises `ValueError` for a block that enters none.
    """
    block = getattr(block, "_orig_mod", block)  # what torch.compile wrapped: hooks need it eager
    handles = [
        module.register_forward_pre_hook(_stop, with_kwargs=True) for module in attentions(block)
    ]
    try:
        block.forward(**arguments)
    except _Reached as reached:
        return reached.hidden_states
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"no modulated input: {type(block).__name__} enters no attention")


def _stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for value in (kwargs.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(value, Tensor):
            raise _Reached(value)
    raise ValueError(f"no modulated input: {type(module).__name__} is given no tensor")
