"""Motif-Video: a guider, and latents beside an empty condition."""

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, quiet, tiny

MODEL = {
    "in_channels": 2 * wan.CHANNELS + 1,
    "out_channels": wan.CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH,
    "rope_axes_dim": (4, 4, 4),
}


def build():
    """A Motif-Video pipeline around tiny components, without a text encoder."""
    return quiet(
        MotifVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=wan.autoencoder(),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(MotifVideoTransformer3DModel, **MODEL),
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    arguments = wan.text(larger)
    del arguments["guidance_scale"]
    masks = {
        "prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "negative_prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
    }
    return arguments | masks


CASES = [Case(name="motif-video", build=build, arguments=text, calls_a_step=2)]
