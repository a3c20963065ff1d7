"""Open-Sora 1.2 (STDiT3): spatial and temporal blocks in turns, one stream of (T, S) tokens.

Two descriptions: `STDiT3Transformer3DModel` of this package, and the original package's model,
which is recognised by its structure.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .family import (
    STARTING_THRESHOLDS,
    BlockList,
    ModelFamily,
    TeaPolynomial,
    entry_point,
    forward_signature,
    register_family,
)

__getattr__ = entry_point(__name__)


OPEN_SORA_1_2 = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "in_channels": 4}
OPEN_SORA_1_2_POLYNOMIAL = TeaPolynomial(
    coefficients=(217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624)
)
"""TeaCache's published fit for Open-Sora 1.2; its fit range is not published."""


AttentionResidual = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def block_pairs(
    stream: str, temporal_residual: AttentionResidual | None = None
) -> tuple[BlockList, BlockList]:
    return (
        BlockList(attribute="spatial_blocks", streams=(stream,), returns=(stream,)),
        BlockList(
            attribute="temporal_blocks",
            streams=(stream,),
            returns=(stream,),
            interleaved=True,
            attention_residual=temporal_residual,
        ),
    )


def published_polynomial(config: Mapping[str, Any]) -> TeaPolynomial | None:
    is_open_sora = all(config.get(key) == value for key, value in OPEN_SORA_1_2.items())
    return OPEN_SORA_1_2_POLYNOMIAL if is_open_sora else None


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    return block.modulated_input(arguments["hidden_states"], arguments["temb"])


def temporal_residual(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    return block.attention_branch(
        arguments["hidden_states"],
        arguments["temb"],
        arguments["num_frames"],
        arguments.get("rotary_emb"),
    )


def original_modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """As `modulated_input`; known frames (``x_mask`` False) are modulated by timestep 0."""
    x, x_mask = block.norm1(arguments["x"]), arguments.get("x_mask")

    def modulated(t: Tensor) -> Tensor:
        shift, scale = (block.scale_shift_table + t.unflatten(-1, (6, -1)))[:, :2, None].unbind(1)
        return x * (1 + scale) + shift

    noisy = modulated(arguments["t"])
    if x_mask is None:
        return noisy
    frames = x_mask.repeat_interleave(arguments["S"], dim=1)
    return torch.where(frames[..., None], noisy, modulated(arguments["t0"]))


def is_original(transformer: nn.Module) -> bool:
    """Whether a transformer is built and called as STDiT3 of the original package."""
    lists = [getattr(transformer, each.attribute, None) for each in block_pairs("x")]
    if not all(isinstance(blocks, nn.ModuleList) and len(blocks) for blocks in lists):
        return False
    arguments = forward_signature(transformer).parameters.keys()
    block_arguments = forward_signature(lists[0][0]).parameters.keys()
    return {"x", "timestep", "y", "x_mask"} <= arguments and (
        {"x", "t", "x_mask", "t0", "T", "S"} <= block_arguments
    )


OPENSORA = register_family(
    ModelFamily(
        name="opensora",
        transformer_class="STDiT3Transformer3DModel",
        block_lists=block_pairs("hidden_states", temporal_residual),
        latents="hidden_states",
        timestep="timestep",
        full_noise_timestep=1000.0,
        output_stream="hidden_states",
        modulated_input=modulated_input,
        published_polynomial=published_polynomial,
        thresholds=STARTING_THRESHOLDS,
        num_frames=lambda arguments: arguments["num_frames"],
    )
)

OPENSORA_ORIGINAL = register_family(
    replace(
        OPENSORA,
        name="opensora-original",
        transformer_class="STDiT3",
        recognises=is_original,
        block_lists=block_pairs("x"),
        latents="x",
        output_stream="x",
        modulated_input=original_modulated_input,
        num_frames=lambda arguments: arguments["T"],
    )
)
