"""Mochi: guidance in one call, and time that runs upwards."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny

MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "pooled_projection_dim": 8,
    "in_channels": 4,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 8,
    "max_sequence_length": TEXT,
}


def build():
    """A Mochi pipeline around a tiny transformer, without autoencoder and text encoder."""
    return quiet(
        MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(MochiTransformer3DModel, **MODEL),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "guidance_scale": 4.5,
        "num_frames": 13,
        "height": 32,
        "width": 48 if larger else 32,
    }


CASES = [Case(name="mochi", build=build, arguments=text)]
