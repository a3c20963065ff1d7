"""Kandinsky 5, text to picture; guided in two calls without a name."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build():
    pipe = Kandinsky5T2IPipeline(
        transformer=tiny(
            Kandinsky5Transformer3DModel,
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 2, 2),
        ),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.resolutions = [(64, 64), (96, 64)]
    return quiet(pipe)


def text(larger: bool) -> dict[str, Any]:
    lengths = torch.tensor([0, TEXT], dtype=torch.int32)
    return {
        "prompt_embeds_qwen": drawn(1, 1, TEXT, WIDTH),
        "prompt_embeds_clip": drawn(2, 1, WIDTH),
        "prompt_cu_seqlens": lengths,
        "negative_prompt_embeds_qwen": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_embeds_clip": drawn(4, 1, WIDTH),
        "negative_prompt_cu_seqlens": lengths,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 96 if larger else 64,
    }


CASES = [Case(name="kandinsky5-t2i", build=build, arguments=text, calls_a_step=2)]
