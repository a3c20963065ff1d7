"""DiT (``DiTTransformer2DModel``): one stream, conditioned on a class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.api import apply_cache_on_transformer

from .layouts import channels_first_tokens, leading_channels, select_hidden_states
from .registry import CORRECTED_THRESHOLDS, BlockList, ModelFamily, register_family

__all__ = ["DIT", "apply_cache_on_transformer"]

STREAMS = ("hidden_states",)


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The first output of adaLN-zero, which embeds timestep and class in every block."""
    hidden_states = arguments["hidden_states"]
    return block.norm1(
        hidden_states,
        arguments["timestep"],
        arguments["class_labels"],
        hidden_dtype=hidden_states.dtype,
    )[0]


def attention_residual(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Gated self-attention of the block."""
    hidden_states = arguments["hidden_states"]
    modulated, gate, *_ = block.norm1(
        hidden_states,
        arguments["timestep"],
        arguments["class_labels"],
        hidden_dtype=hidden_states.dtype,
    )
    return gate.unsqueeze(1) * block.attn1(modulated)


DIT = register_family(
    ModelFamily(
        name="dit",
        transformer_class="DiTTransformer2DModel",
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
        batch_arguments=("hidden_states", "timestep", "class_labels"),
        guided_copies=2,
    )
)
