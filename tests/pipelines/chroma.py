"""Chroma, AuraFlow, CogView 4."""

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny

NO_TEXT = {"text_encoder": None, "tokenizer": None}


def build_chroma():
    return quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(shift_factor=0.1),
            transformer=tiny(
                ChromaTransformer2DModel,
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 4),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            **NO_TEXT,
        )
    )


def build_auraflow():
    return quiet(
        AuraFlowPipeline(
            vae=autoencoder(),
            transformer=tiny(
                AuraFlowTransformer2DModel,
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                caption_projection_dim=16,
                pos_embed_max_size=144,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            **NO_TEXT,
        )
    )


def build_cogview4():
    return quiet(
        CogView4Pipeline(
            vae=autoencoder(),
            transformer=tiny(
                CogView4Transformer2DModel,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=WIDTH,
                time_embed_dim=16,
                condition_dim=8,
                sample_size=8,
                rope_axes_dim=(8, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_shift=0.25,
                max_shift=0.75,
                use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
            **NO_TEXT,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 32 if larger else 16,
    }


def masked(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT)
    return text(larger) | {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


CASES = [
    Case(name="chroma", build=build_chroma, arguments=masked, calls_a_step=2),
    Case(name="auraflow", build=build_auraflow, arguments=masked),
    Case(name="cogview4", build=build_cogview4, arguments=text, calls_a_step=2),
]
