"""Sana-Video: linear attention under a multistep sampler, and from a picture."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, picture, quiet, tiny

MODEL = {
    "in_channels": wan.CHANNELS,
    "out_channels": wan.CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": WIDTH,
    "mlp_ratio": 2.0,
    "rope_max_seq_len": 32,
}


def dpmsolver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build(cls=SanaVideoPipeline, scheduler=dpmsolver):
    """A Sana-Video pipeline of that class around tiny components, without a text encoder."""
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=wan.autoencoder(),
            transformer=tiny(SanaVideoTransformer3DModel, **MODEL),
            scheduler=scheduler(),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    arguments = wan.text(larger)
    arguments["frames"] = arguments.pop("num_frames")
    return arguments | {
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt": None,
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "use_resolution_binning": False,
    }


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **wan.size(larger))}


CASES = [
    Case(name="sana-video", build=build, arguments=text),
    Case(
        name="sana-video-i2v",
        build=partial(build, SanaImageToVideoPipeline, flow),
        arguments=with_picture,
    ),
]
