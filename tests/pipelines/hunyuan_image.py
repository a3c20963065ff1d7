"""HunyuanImage: the guidance is an object with a momentum."""

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny

BLOCKS = {"num_layers": 2, "num_single_layers": 2}


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def build():
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


def text(larger: bool) -> dict[str, Any]:
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
    Case(name="hunyuan-image", build=build, arguments=text, calls_a_step=2),
]
