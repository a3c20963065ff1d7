"""CogView 3 Plus with either sampler of CogVideoX, and CogView 4.

The second sampler's step takes, and returns, the last prediction, too.
"""

from functools import partial
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

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


def build_cogview4():
    return quiet(
        CogView4Pipeline(
            vae=autoencoder(),
            transformer=tiny(
                CogView4Transformer2DModel,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=WIDTH,
                time_embed_dim=16,
                condition_dim=8,
                sample_size=8,
                rope_axes_dim=(8, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_shift=0.25,
                max_shift=0.75,
                use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
            **NO_TEXT,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 32 if larger else 16,
    }


CASES = [
    Case(name="cogview4", build=build_cogview4, arguments=text, calls_a_step=2),
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
]
