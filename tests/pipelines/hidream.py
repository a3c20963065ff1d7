"""HiDream: mixtures of experts, guided in one batch."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny

LLAMA_LAYERS = 2


def build():
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


def text(larger: bool) -> dict[str, Any]:
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


CASES = [
    Case(name="hidream", build=build, arguments=text),
]
