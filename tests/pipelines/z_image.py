"""Z-Image and both Lumina: lists of tensors out of the transformer, guidance that stops early."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build_z_image():
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(
                ZImageTransformer2DModel,
                in_channels=4,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 2, 2],
                axes_lens=[256, 32, 32],
            ),
        )
    )


def z_image(larger: bool, guidance_scale: float) -> dict[str, Any]:
    return {
        "prompt_embeds": [drawn(1, TEXT, WIDTH)],
        "negative_prompt_embeds": [drawn(3, TEXT - 1, WIDTH)],
        "guidance_scale": guidance_scale,
        "height": 16,
        "width": 24 if larger else 16,
    }


def build_lumina2():
    return quiet(
        Lumina2Pipeline(
            transformer=tiny(
                Lumina2Transformer2DModel,
                sample_size=8,
                in_channels=4,
                hidden_size=16,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 2, 2),
                axes_lens=(64, 32, 32),
                cap_feat_dim=WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def build_lumina():
    return quiet(
        LuminaPipeline(
            transformer=tiny(
                LuminaNextDiT2DModel,
                sample_size=8,
                in_channels=4,
                hidden_size=16,
                num_layers=2,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                cross_attention_dim=WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def lumina2(larger: bool, **more) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 96 if larger else 64,
        **more,
    }


CASES = [
    Case(name="z-image", build=build_z_image, arguments=partial(z_image, guidance_scale=3.0)),
    Case(
        name="z-image-unguided",
        build=build_z_image,
        arguments=partial(z_image, guidance_scale=0.0),
    ),
    Case(name="lumina", build=build_lumina, arguments=partial(lumina2, clean_caption=False)),
    Case(name="lumina2", build=build_lumina2, arguments=lumina2, calls_a_step=2),
    Case(
        name="lumina2-truncated-guidance",
        build=build_lumina2,
        arguments=partial(lumina2, cfg_trunc_ratio=0.5),
        calls_a_step=None,
    ),
]
