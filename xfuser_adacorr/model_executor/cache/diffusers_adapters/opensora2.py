"""Open-Sora 2.0 (MMDiT of its package): dual-stream blocks, then one joint (text, video) stream."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .family import (
    CORRECTED_THRESHOLDS,
    BlockList,
    ModelFamily,
    entry_point,
    forward_signature,
    register_family,
)

__getattr__ = entry_point(__name__)


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    modulation, _ = block.img_mod(arguments["vec"])
    return (1 + modulation.scale) * block.img_norm1(arguments["img"]) + modulation.shift


def is_mmdit(transformer: nn.Module) -> bool:
    """Whether a transformer is built and called as Open-Sora 2.0's, or the FLUX it comes from."""
    lists = [getattr(transformer, name, None) for name in ("double_blocks", "single_blocks")]
    if not all(isinstance(blocks, nn.ModuleList) and len(blocks) for blocks in lists):
        return False
    called = (transformer, lists[0][0], lists[1][0])
    required = ({"img", "txt", "timesteps"}, {"img", "txt", "vec", "pe"}, {"x", "vec", "pe"})
    return all(
        names <= forward_signature(module).parameters.keys()
        for module, names in zip(called, required, strict=True)
    )


OPENSORA2 = register_family(
    ModelFamily(
        name="opensora2",
        transformer_class="MMDiTModel",
        recognises=is_mmdit,
        block_lists=(
            BlockList(attribute="double_blocks", streams=("img", "txt"), returns=("img", "txt")),
            BlockList(
                attribute="single_blocks",
                streams=("txt", "img"),
                returns=("txt", "img"),
                joint="x",
            ),
        ),
        latents="img",
        timestep="timesteps",
        output_stream="img",
        modulated_input=modulated_input,
        thresholds={"Fb": 0.12, "Tea": 0.25, "Fast": 0.05, "Ada": 1.0, **CORRECTED_THRESHOLDS},
    )
)
