"""Kandinsky 5: channels last, and latents that the pipeline changes in place."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from tests.pipelines import hunyuan_video
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny

CHANNELS = hunyuan_video.CHANNELS
"""Of the latents."""
MODEL = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": WIDTH,
    "in_text_dim2": WIDTH,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}


def build(cls=Kandinsky5T2VPipeline, **model: Any):
    """A Kandinsky pipeline of that class around tiny components, without text encoders."""
    return quiet(
        cls(
            transformer=tiny(Kandinsky5Transformer3DModel, **MODEL, **model),
            vae=hunyuan_video.autoencoder(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 48 if larger else 32}


def prompt(seed: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds_qwen": drawn(seed, 1, TEXT, WIDTH),
        f"{prefix}prompt_embeds_clip": drawn(seed + 1, 1, WIDTH),
        f"{prefix}prompt_cu_seqlens": torch.tensor([0, TEXT]),
    }


def text(larger: bool, guidance: float = 5.0) -> dict[str, Any]:
    return {
        **prompt(1),
        **prompt(3, "negative_"),
        "guidance_scale": guidance,
        "num_frames": 9,
        **size(larger),
    }


def with_picture(larger: bool) -> dict[str, Any]:
    """The pipeline fits the mean of the first four latent frames to that of the next two."""
    return text(larger) | {"image": picture(5, **size(larger)), "num_frames": 21}


CASES = [
    Case(name="kandinsky5-t2v", build=build, arguments=text, calls_a_step=2),
    Case(name="kandinsky5-t2v-unguided", build=build, arguments=partial(text, guidance=1.0)),
    Case(
        name="kandinsky5-i2v",
        build=partial(build, Kandinsky5I2VPipeline, visual_cond=True),
        arguments=with_picture,
        calls_a_step=2,
    ),
]
