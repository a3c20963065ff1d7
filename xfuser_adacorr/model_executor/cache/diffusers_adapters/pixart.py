"""PixArt-alpha and PixArt-Sigma (``PixArtTransformer2DModel``): one stream, text by attention."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .family import STARTING_THRESHOLDS, BlockList, ModelFamily, entry_point, register_family
from .layouts import select_hidden_states

__getattr__ = entry_point(__name__)


STREAMS = ("hidden_states",)


def attention_residual(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Gated self-attention of the block."""
    modulation = block.scale_shift_table + arguments["timestep"].unflatten(-1, (6, -1))
    shift, scale, gate = modulation[:, :3].split(1, dim=1)
    modulated = block.norm1(arguments["hidden_states"]) * (1 + scale) + shift
    return gate * block.attn1(modulated, attention_mask=arguments.get("attention_mask"))


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
        timestep="timestep",
        full_noise_timestep=1000.0,
        output_stream="hidden_states",
        select_tokens=select_hidden_states,
        thresholds=STARTING_THRESHOLDS,
    )
)
