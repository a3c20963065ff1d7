"""Clips in place of a user's, and tiny encoders of pictures."""

from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.pipelines.stand_ins import drawn, from_config

IMAGE_WIDTH = 8
"""Of the tokens that an encoder makes of a picture."""
ENCODER = {
    "hidden_size": IMAGE_WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def clip(seed: int, frames: int, height: int, width: int) -> Tensor:
    """A clip [1, frames, 3, height, width] in 0..1."""
    return drawn(seed, 1, frames, 3, height, width).sigmoid()


def clip_image_encoder(seed: int = 13) -> CLIPVisionModel:
    """For ``clip_image_processor``: a picture to 5 tokens."""
    return from_config(CLIPVisionModel, CLIPVisionConfig(**ENCODER), seed)


def clip_image_processor() -> CLIPImageProcessorPil:
    """Reads pictures of any size, tensors in 0..1."""
    return CLIPImageProcessorPil(size=16, crop_size=16, do_rescale=False)


def siglip_image_encoder(seed: int = 14) -> SiglipVisionModel:
    """For ``siglip_image_processor``: a picture to 4 tokens."""
    return from_config(SiglipVisionModel, SiglipVisionConfig(**ENCODER), seed)


def siglip_image_processor() -> SiglipImageProcessorPil:
    """Reads pictures of any size."""
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})
