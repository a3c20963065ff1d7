"""CogView 3 Plus with either sampler of CogVideoX, PRX, and ERNIE-Image.

The second sampler's step takes, and returns, the last prediction, too.
"""

from functools import partial
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
)
from diffusers.models import PRXTransformer2DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny

NO_TEXT = {"text_encoder": None, "tokenizer": None}


def build_cogview3(scheduler):
    return quiet(
        CogView3PlusPipeline(
            vae=autoencoder(),
            transformer=tiny(
                CogView3PlusTransformer2DModel,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=WIDTH,
                time_embed_dim=16,
                condition_dim=8,
                pos_embed_max_size=16,
                sample_size=8,
            ),
            scheduler=scheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
            ),
            **NO_TEXT,
        )
    )


def text(larger: bool, side: int = 16) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": side,
        "width": 2 * side if larger else side,
    }


def build_prx():
    return quiet(
        PRXPipeline(
            transformer=tiny(
                PRXTransformer2DModel,
                in_channels=4,
                context_in_dim=WIDTH,
                hidden_size=16,
                mlp_ratio=2.0,
                num_heads=2,
                depth=2,
                axes_dim=[4, 4],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            **NO_TEXT,
        )
    )


def prx(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    return text(larger, 64) | {
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }


def build_ernie():
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
            **NO_TEXT,
        )
    )


def ernie(larger: bool) -> dict[str, Any]:
    return text(larger, 64) | {
        "prompt_embeds": [drawn(1, TEXT, WIDTH)],
        "negative_prompt_embeds": [drawn(3, TEXT - 1, WIDTH)],
    }


CASES = [
    Case(
        name="cogview3-ddim",
        build=partial(build_cogview3, CogVideoXDDIMScheduler),
        arguments=text,
    ),
    Case(
        name="cogview3-dpm",
        build=partial(build_cogview3, CogVideoXDPMScheduler),
        arguments=text,
        stochastic=True,
    ),
    Case(name="prx", build=build_prx, arguments=prx),
    Case(name="ernie-image", build=build_ernie, arguments=ernie),
]
