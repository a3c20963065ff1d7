"""Clips in place of a user's, and a tiny encoder of pictures."""

from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from tests.pipelines.stand_ins import drawn, from_config

IMAGE_WIDTH = 8
"""Of the tokens that ``image_encoder`` makes of a picture."""


def clip(seed: int, frames: int, height: int, width: int) -> Tensor:
    """A clip [1, frames, 3, height, width] in 0..1."""
    return drawn(seed, 1, frames, 3, height, width).sigmoid()


def image_encoder(seed: int = 13) -> CLIPVisionModel:
    """For ``image_processor``: pictures of 16x16 to 5 tokens."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return from_config(CLIPVisionModel, config, seed)


def image_processor() -> CLIPImageProcessorPil:
    """Reads pictures of any size in 0..1."""
    return CLIPImageProcessorPil(size=16, crop_size=16, do_rescale=False)
