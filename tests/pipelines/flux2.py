"""FLUX.2 and FLUX.2 Klein: text, with pictures as references, guided in two named calls."""

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def build(cls=Flux2Pipeline, guidance_embeds=True):
    """A pipeline of that class without a text encoder."""
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny(
                AutoencoderKLFlux2,
                10,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=4,
            ),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(
                Flux2Transformer2DModel,
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=guidance_embeds,
            ),
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 24 if larger else 16,
    }


def edit(larger: bool) -> dict[str, Any]:
    colours = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    return text(larger) | {"image": [colours]}


def guided(larger: bool) -> dict[str, Any]:
    return text(larger) | {"negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH)}


def keys_and_values(larger: bool) -> dict[str, Any]:
    """The first call gives the keys and values of the reference to all others."""
    return {key: value for key, value in edit(larger).items() if key != "guidance_scale"}


KLEIN = partial(build, Flux2KleinPipeline, guidance_embeds=False)

CASES = [
    Case(name="flux2", build=build, arguments=text),
    Case(name="flux2-edit", build=build, arguments=edit),
    Case(name="flux2-klein", build=KLEIN, arguments=guided, calls_a_step=2),
    Case(
        name="flux2-klein-kv",
        irregular=True,
        calls_a_step=None,  # the second step is called with what the first one stored
        build=partial(build, Flux2KleinKVPipeline, guidance_embeds=False),
        arguments=keys_and_values,
    ),
]
