"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .family import (
    CORRECTED_THRESHOLDS,
    BlockList,
    ModelFamily,
    TeaPolynomial,
    entry_point,
    register_family,
)

__getattr__ = entry_point(__name__)


STREAMS = ("hidden_states", "encoder_hidden_states")
RETURNS = ("encoder_hidden_states", "hidden_states")

FLUX_DEV_LAYERS = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
FLUX_DEV_POLYNOMIAL = TeaPolynomial(
    coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
)
"""TeaCache's published fit for FLUX.1-dev; its fit range is not published."""


def select_tokens(arguments: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Keep the image tokens in ``index``; the rotary embedding covers text, then image tokens."""
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    cos, sin = arguments["image_rotary_emb"]
    rows = torch.cat([torch.arange(text_tokens, device=index.device), index + text_tokens])
    return {
        "hidden_states": arguments["hidden_states"][:, index],
        "image_rotary_emb": (cos[rows], sin[rows]),
    }


def published_polynomial(config: Mapping[str, Any]) -> TeaPolynomial | None:
    is_flux_dev = all(config.get(key) == value for key, value in FLUX_DEV_LAYERS.items())
    return FLUX_DEV_POLYNOMIAL if is_flux_dev else None


FLUX = register_family(
    ModelFamily(
        name="flux",
        transformer_class="FluxTransformer2DModel",
        block_lists=(
            BlockList(attribute="transformer_blocks", streams=STREAMS, returns=RETURNS),
            BlockList(attribute="single_transformer_blocks", streams=STREAMS, returns=RETURNS),
        ),
        latents="hidden_states",
        timestep="timestep",
        output_stream="hidden_states",
        select_tokens=select_tokens,
        published_polynomial=published_polynomial,
        thresholds={"Fb": 0.12, "Tea": 0.25, "Fast": 0.05, "Ada": 1.0, **CORRECTED_THRESHOLDS},
    )
)
