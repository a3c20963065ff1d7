"""PixArt alpha and Sigma: guided in one batch, noise predicted."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def make_pixart():
    return tiny(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


def build(cls, transformer, scheduler):
    """A pipeline of that class with neither text encoder nor VAE."""
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer(),
            scheduler=scheduler(),
        )
    )


def text(larger: bool, side: int) -> dict[str, Any]:
    """Prompts of which the last two tokens are padding."""
    mask = torch.ones(1, TEXT)
    mask[:, -2:] = 0
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "height": side,
        "width": side * 3 // 2 if larger else side,
    }


CASES = [
    Case(
        name="pixart-sigma",
        build=partial(build, PixArtSigmaPipeline, make_pixart, DPMSolverMultistepScheduler),
        arguments=partial(text, side=64),
    ),
    Case(
        name="pixart-alpha",
        build=partial(build, PixArtAlphaPipeline, make_pixart, DPMSolverMultistepScheduler),
        arguments=partial(text, side=64),
    ),
]
