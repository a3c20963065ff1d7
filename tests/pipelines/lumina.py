"""Lumina and Lumina 2: guided in one batch, or in two calls; guidance that stops early."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


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


def text(larger: bool, **more) -> dict[str, Any]:
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
    Case(name="lumina", build=build_lumina, arguments=partial(text, clean_caption=False)),
    Case(name="lumina2", build=build_lumina2, arguments=text, calls_a_step=2),
    Case(
        name="lumina2-truncated-guidance",
        build=build_lumina2,
        arguments=partial(text, cfg_trunc_ratio=0.5),
        calls_a_step=None,
    ),
]
