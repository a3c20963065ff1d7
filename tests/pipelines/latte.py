"""Latte: DDIM, and a transformer that predicts a variance too."""

from typing import Any

from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny

CHANNELS = 4
"""Of the latents."""
MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": WIDTH,
    "video_length": 3,
}


def build():
    """A Latte pipeline around a tiny transformer, without autoencoder and text encoder."""
    return quiet(
        LattePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=tiny(LatteTransformer3DModel, **MODEL),
            scheduler=DDIMScheduler(
                beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
            ),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    """Frames are of one number alone: the model's."""
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt": None,
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "guidance_scale": 4.0,
        "video_length": MODEL["video_length"],
        "height": 32,
        "width": 48 if larger else 32,
    }


CASES = [Case(name="latte", build=build, arguments=text)]
