"""DiT (``DiTTransformer2DModel``): one stream, conditioned on a class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .family import STARTING_THRESHOLDS, BlockList, ModelFamily, entry_point, register_family
from .layouts import select_hidden_states

__getattr__ = entry_point(__name__)


STREAMS = ("hidden_states",)


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
        timestep="timestep",
        full_noise_timestep=1000.0,
        output_stream="hidden_states",
        select_tokens=select_hidden_states,
        thresholds=STARTING_THRESHOLDS,
    )
)
