"""EasyAnimate: flow matching with guidance in one call."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny

CHANNELS = 4
"""Of the latents."""
MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "sample_width": 4,
    "sample_height": 4,
    "num_layers": 2,
    "mmdit_layers": 1,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
}


def build():
    """An EasyAnimate pipeline around tiny components, without a text encoder."""
    return quiet(
        EasyAnimatePipeline(
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(EasyAnimateTransformer3DModel, **MODEL),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )


def autoencoder() -> AutoencoderKLMagvit:
    """Clips to latents of an eighth of the height and width and a quarter of the frames."""
    return tiny(
        AutoencoderKLMagvit,
        10,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "guidance_scale": 4.0,
        "num_frames": 9,
        "height": 32,
        "width": 48 if larger else 32,
    }


CASES = [Case(name="easyanimate", build=build, arguments=text)]
