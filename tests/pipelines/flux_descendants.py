"""Ovis-Image, Bria, HunyuanImage, Chroma's kin: packed or whole latents, guiders with a state."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    BriaPipeline,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny

BLOCKS = {"num_layers": 2, "num_single_layers": 2}
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def build_packed(cls, transformer, **config):
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
                **BLOCKS,
                **HEADS,
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


def build_hunyuan_image():
    return quiet(
        HunyuanImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny(
                HunyuanImageTransformer2DModel,
                in_channels=4,
                out_channels=4,
                num_refiner_layers=1,
                mlp_ratio=2.0,
                text_embed_dim=WIDTH,
                text_embed_2_dim=WIDTH,
                rope_axes_dim=(4, 4),
                **BLOCKS,
                **HEADS,
            ),
            guider=AdaptiveProjectedMixGuidance(
                adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_start_step=2
            ),
        )
    )


def hunyuan_image(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    arguments = {"height": 256, "width": 384 if larger else 256}
    for seed, number in enumerate(("", "_2"), start=1):
        arguments |= {
            f"prompt_embeds{number}": drawn(seed, 1, TEXT, WIDTH),
            f"prompt_embeds_mask{number}": mask,
            f"negative_prompt_embeds{number}": drawn(seed + 2, 1, TEXT, WIDTH),
            f"negative_prompt_embeds_mask{number}": mask,
        }
    return arguments


CASES = [
    Case(
        name="ovis-image",
        build=partial(
            build_packed, OvisImagePipeline, OvisImageTransformer2DModel, out_channels=16
        ),
        arguments=ovis,
        calls_a_step=2,
    ),
    Case(
        name="bria",
        build=partial(build_packed, BriaPipeline, BriaTransformer2DModel),
        arguments=bria,
    ),
    Case(name="hunyuan-image", build=build_hunyuan_image, arguments=hunyuan_image, calls_a_step=2),
]
