"""Chroma: true guidance in two calls without a name."""

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build():
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
            text_encoder=None,
            tokenizer=None,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT)
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 32 if larger else 16,
    }


CASES = [Case(name="chroma", build=build, arguments=text, calls_a_step=2)]
