"""HiDream and HunyuanDiT: mixtures of experts, skips between blocks, guided in one batch."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny

LLAMA_LAYERS = 2


def build_hidream():
    names = (f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4"))
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        transformer=tiny(
            HiDreamImageTransformer2DModel,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=list(range(LLAMA_LAYERS)),
        ),
        **dict.fromkeys(names),
    )
    pipe.default_sample_size = 8  # every picture is scaled to this area
    return quiet(pipe)


def hidream(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds_t5": drawn(1, 1, TEXT, WIDTH),
        "prompt_embeds_llama3": drawn(2, LLAMA_LAYERS, 1, TEXT, WIDTH),
        "pooled_prompt_embeds": drawn(3, 1, WIDTH),
        "negative_prompt_embeds_t5": drawn(4, 1, TEXT, WIDTH),
        "negative_prompt_embeds_llama3": drawn(5, LLAMA_LAYERS, 1, TEXT, WIDTH),
        "negative_pooled_prompt_embeds": drawn(6, 1, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_images_per_prompt": 2 if larger else 1,
    }


def build_hunyuandit():
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


def hunyuandit(larger: bool) -> dict[str, Any]:
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
    Case(name="hidream", build=build_hidream, arguments=hidream),
    Case(name="hunyuandit", build=build_hunyuandit, arguments=hunyuandit),
]
