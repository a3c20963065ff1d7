"""PixArt-alpha and PixArt-Sigma (``PixArtTransformer2DModel``): one stream, text by attention."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.api import apply_cache_on_transformer

from .layouts import channels_first_tokens, leading_channels, select_hidden_states
from .registry import CORRECTED_THRESHOLDS, BlockList, ModelFamily, register_family

__all__ = ["PIXART", "apply_cache_on_transformer"]

STREAMS = ("hidden_states",)


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Normalised tokens, scaled and shifted by the block's table plus ``timestep [B, 6C]``."""
    hidden_states = arguments["hidden_states"]
    modulation = block.scale_shift_table + arguments["timestep"].unflatten(-1, (6, -1))
    shift, scale = modulation[:, 0:1], modulation[:, 1:2]
    return block.norm1(hidden_states) * (1 + scale) + shift


def attention_residual(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Gated self-attention of the block."""
    modulation = block.scale_shift_table + arguments["timestep"].unflatten(-1, (6, -1))
    return modulation[:, 2:3] * block.attn1(
        modulated_input(block, arguments), attention_mask=arguments.get("attention_mask")
    )


PIXART = register_family(
    ModelFamily(
        name="pixart",
        transformer_class="PixArtTransformer2DModel",
        block_lists=(
            BlockList(
                attribute="transformer_blocks",
                streams=STREAMS,
                returns=STREAMS,
                attention_residual=attention_residual,
            ),
        ),
        latents="hidden_states",
        latent_tokens=channels_first_tokens,
        timestep="timestep",
        full_noise_timestep=1000.0,
        output_stream="hidden_states",
        followed=leading_channels,
        modulated_input=modulated_input,
        select_tokens=select_hidden_states,
        thresholds={"Fb": 0.12, "Tea": 0.15, "Fast": 0.05, "Ada": 1.0, **CORRECTED_THRESHOLDS},
        batch_arguments=(
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "added_cond_kwargs",
            "attention_mask",
            "encoder_attention_mask",
        ),
        guided_copies=2,
    )
)
