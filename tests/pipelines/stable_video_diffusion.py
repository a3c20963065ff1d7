"""Stable Video Diffusion: Euler steps of EDM, and guidance that grows along the frames."""

from typing import Any

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import from_config, picture, quiet, tiny
from tests.pipelines.video_stand_ins import ENCODER, IMAGE_WIDTH, clip_image_processor

CHANNELS = 4
"""Of the latents."""
FRAMES = 3
UNET = {
    "in_channels": 2 * CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 32),  # 32 groups are norms' fewest
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "layers_per_block": 1,
    "cross_attention_dim": IMAGE_WIDTH,
    "num_attention_heads": (2, 2),
    "num_frames": FRAMES,
}


def build():
    """A Stable Video Diffusion pipeline around tiny components."""
    return quiet(
        StableVideoDiffusionPipeline(
            vae=autoencoder(),
            image_encoder=image_encoder(),
            unet=tiny(UNetSpatioTemporalConditionModel, **UNET),
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
                interpolation_type="linear",
            ),
            feature_extractor=clip_image_processor(),
        )
    )


def autoencoder() -> AutoencoderKLTemporalDecoder:
    """Frames to latents of half their height and width."""
    return tiny(
        AutoencoderKLTemporalDecoder,
        10,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=CHANNELS,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    """A picture of 16x16 to one token."""
    config = CLIPVisionConfig(**ENCODER, projection_dim=IMAGE_WIDTH)
    return from_config(CLIPVisionModelWithProjection, config)


def from_picture(larger: bool) -> dict[str, Any]:
    return {
        "image": picture(5, 16, 16),
        "num_frames": FRAMES,
        "height": 16,
        "width": 24 if larger else 16,
    }


CASES = [
    Case(
        name="stable-video-diffusion",
        build=build,
        arguments=from_picture,
        denoisers=("unet",),
    )
]
