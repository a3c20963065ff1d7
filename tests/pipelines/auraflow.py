"""AuraFlow: guided in one batch."""

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build():
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


CASES = [Case(name="auraflow", build=build, arguments=text)]
