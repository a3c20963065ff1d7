"""HunyuanDiT: skips between its blocks, and a variance predicted beside the noise."""

from typing import Any

import torch
from diffusers import DDIMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def build():
    return quiet(
        HunyuanDiTPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny(
                HunyuanDiT2DModel,
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                patch_size=2,
                sample_size=8,
                hidden_size=16,
                num_layers=4,
                mlp_ratio=2.0,
                cross_attention_dim=WIDTH,
                cross_attention_dim_t5=WIDTH,
                pooled_projection_dim=WIDTH,
                text_len=TEXT,
                text_len_t5=TEXT,
            ),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT)
    arguments = {
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "height": 64,
        "width": 96 if larger else 64,
    }
    for seed, number in enumerate(("", "_2"), start=1):
        arguments |= {
            f"prompt_embeds{number}": drawn(seed, 1, TEXT, WIDTH),
            f"prompt_attention_mask{number}": mask,
            f"negative_prompt_embeds{number}": drawn(seed + 2, 1, TEXT, WIDTH),
            f"negative_prompt_attention_mask{number}": mask,
        }
    return arguments


CASES = [
    Case(name="hunyuandit", build=build, arguments=text),
]
