"""ERNIE-Image: prompts of different lengths in one batch."""

from typing import Any

from diffusers import (
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def build():
    return quiet(
        ErnieImagePipeline(
            transformer=tiny(
                ErnieImageTransformer2DModel,
                hidden_size=16,
                num_attention_heads=2,
                num_layers=2,
                ffn_hidden_size=16,
                in_channels=4,
                out_channels=4,
                text_in_dim=WIDTH,
                rope_axes_dim=(4, 2, 2),
            ),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None,
            tokenizer=None,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": [drawn(1, TEXT, WIDTH)],
        "negative_prompt_embeds": [drawn(3, TEXT - 1, WIDTH)],
        "guidance_scale": 3.0,
        "height": 64,
        "width": 96 if larger else 64,
    }


CASES = [Case(name="ernie-image", build=build, arguments=text)]
