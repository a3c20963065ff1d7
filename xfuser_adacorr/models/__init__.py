"""Transformers that diffusers lacks, in diffusers style; imported when first used."""

from importlib import import_module
from typing import Any

_LAZY = {
    "STDiT3Transformer3DModel": "stdit3",
    "load_open_sora_checkpoint": "stdit3_checkpoint",
}

__all__ = ["STDiT3Transformer3DModel", "load_open_sora_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
