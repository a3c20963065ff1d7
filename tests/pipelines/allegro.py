"""Allegro: guidance in one call, and an ancestral sampler that draws noise."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny

MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_height": 4,
    "sample_width": 4,
    "sample_frames": 3,
    "caption_channels": WIDTH,
}


def build(scheduler=EulerAncestralDiscreteScheduler):
    """An Allegro pipeline around a tiny transformer, without autoencoder and text encoder."""
    return quiet(
        AllegroPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=tiny(AllegroTransformer3DModel, **MODEL),
            scheduler=scheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt": None,
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "guidance_scale": 4.0,
        "num_frames": 12,
        "height": 32,
        "width": 48 if larger else 32,
    }


CASES = [
    Case(name="allegro", build=build, arguments=text, stochastic=True),
    Case(name="allegro-euler", build=partial(build, EulerDiscreteScheduler), arguments=text),
]
