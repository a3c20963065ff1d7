"""Ovis-Image and Bria: packed latents as in FLUX."""

from functools import partial
from typing import Any

from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build(cls, transformer, **config):
    """A pipeline without a text encoder around a model of packed latents."""
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(
                transformer,
                in_channels=16,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 4),
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                **config,
            ),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 24 if larger else 16,
    }


def ovis(larger: bool) -> dict[str, Any]:
    return text(larger) | {"negative_prompt": None}


def bria(larger: bool) -> dict[str, Any]:
    return text(larger) | {"width": 32 if larger else 16}


CASES = [
    Case(
        name="ovis-image",
        build=partial(build, OvisImagePipeline, OvisImageTransformer2DModel, out_channels=16),
        arguments=ovis,
        calls_a_step=2,
    ),
    Case(
        name="bria",
        build=partial(build, BriaPipeline, BriaTransformer2DModel),
        arguments=bria,
    ),
]
