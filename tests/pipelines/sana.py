"""Sana and Sana Sprint: flow by a multistep solver, and few steps that start from noise anew."""

from functools import partial
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.pixart import build, text
from tests.pipelines.stand_ins import WIDTH, tiny


def flow_solver():
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
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


def make_sprint():
    return make_sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def sprint(larger: bool) -> dict[str, Any]:
    """The guidance is in the weights; the sampler starts anew from noise in every step."""
    arguments = {k: v for k, v in text(larger, 256).items() if not k.startswith("negative")}
    return arguments | {"intermediate_timesteps": None}


CASES = [
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
        irregular=True,
        build=partial(
            build,
            SanaSprintPipeline,
            make_sprint,
            partial(SCMScheduler, prediction_type="trigflow", sigma_data=0.5),
        ),
        arguments=sprint,
        stochastic=True,
    ),
]
