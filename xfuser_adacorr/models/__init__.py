"""Pipelines, transformers and samplers that diffusers lacks; imported when first used."""

from importlib import import_module
from typing import Any

_LAZY = {
    "OpenSoraPipeline": "opensora.pipeline",
    "OpenSoraPipelineOutput": "opensora.pipeline",
    "RectifiedFlowScheduler": "opensora.rectified_flow",
    "STDiT3Transformer3DModel": "opensora.transformer",
    "load_open_sora_checkpoint": "opensora.checkpoint",
}

__all__ = [
    "OpenSoraPipeline",
    "OpenSoraPipelineOutput",
    "RectifiedFlowScheduler",
    "STDiT3Transformer3DModel",
    "load_open_sora_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
