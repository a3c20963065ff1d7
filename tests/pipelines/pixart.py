"""PixArt, DiT, Sana: guided in one batch; noise predicted, or flow by a multistep solver."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def flow_solver():
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


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


def make_sana(**config):
    return tiny(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        **config,
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


def sprint(larger: bool) -> dict[str, Any]:
    """The guidance is in the weights; the sampler starts anew from noise in every step."""
    arguments = {k: v for k, v in text(larger, 256).items() if not k.startswith("negative")}
    return arguments | {"intermediate_timesteps": None}


def make_sprint():
    return make_sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def build_dit(scheduler=DDIMScheduler):
    return quiet(
        DiTPipeline(
            transformer=tiny(
                DiTTransformer2DModel,
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                sample_size=8,
                num_embeds_ada_norm=1000,
            ),
            vae=autoencoder(),
            scheduler=scheduler(),
        )
    )


def labels(larger: bool) -> dict[str, Any]:
    return {"class_labels": [3, 5] if larger else [3], "guidance_scale": 3.0}


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
    Case(
        name="sana",
        build=partial(build, SanaPipeline, make_sana, flow_solver),
        arguments=partial(text, side=256),
    ),
    Case(
        name="sana-euler",
        build=partial(build, SanaPipeline, make_sana, FlowMatchEulerDiscreteScheduler),
        arguments=partial(text, side=256),
    ),
    Case(
        name="sana-sprint",
        build=partial(
            build,
            SanaSprintPipeline,
            make_sprint,
            partial(SCMScheduler, prediction_type="trigflow", sigma_data=0.5),
        ),
        arguments=sprint,
        stochastic=True,
    ),
    Case(name="dit", build=build_dit, arguments=labels, output_type="np"),
]
