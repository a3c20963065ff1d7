"""Stable Diffusion 3: text, image-to-image, ControlNet, skipped layers, Heun's solver."""

from functools import partial
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, picture, quiet, tiny

MODEL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": WIDTH,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def build(cls=StableDiffusion3Pipeline, scheduler=FlowMatchEulerDiscreteScheduler, **components):
    """A pipeline of that class without text encoders."""
    names = (f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    return quiet(
        cls(
            transformer=tiny(SD3Transformer2DModel, **MODEL),
            scheduler=scheduler(shift=3.0),
            vae=autoencoder(shift_factor=0.1),
            **dict.fromkeys(names),
            **{name: make() for name, make in components.items()},
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "pooled_prompt_embeds": drawn(2, 1, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_pooled_prompt_embeds": drawn(4, 1, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 24 if larger else 16,
    }


def img2img(larger: bool) -> dict[str, Any]:
    arguments = text(larger)
    image = picture(5, arguments["height"], arguments["width"])
    return arguments | {"image": image, "strength": 0.5}


def control(larger: bool) -> dict[str, Any]:
    arguments = text(larger)
    return arguments | {"control_image": picture(6, arguments["height"], arguments["width"])}


def skipped_layers(larger: bool) -> dict[str, Any]:
    """A third branch, in a call of its own, in the steps 1 to 4 of 7."""
    return text(larger) | {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}


def make_controlnet():
    return tiny(SD3ControlNetModel, 1, **MODEL)


CASES = [
    Case(name="sd3", build=build, arguments=text),
    Case(
        name="sd3-img2img",
        build=partial(build, StableDiffusion3Img2ImgPipeline),
        arguments=img2img,
        strength=0.5,
    ),
    Case(
        name="sd3-heun",
        build=partial(build, scheduler=FlowMatchHeunDiscreteScheduler),
        arguments=text,
        order=2,
    ),
    Case(
        name="sd3-controlnet",
        build=partial(build, StableDiffusion3ControlNetPipeline, controlnet=make_controlnet),
        arguments=control,
        denoisers=("transformer", "controlnet"),
        calls_a_step=2,
    ),
    Case(
        name="sd3-skipped-layers",
        build=build,
        arguments=skipped_layers,
        calls_a_step=None,
        irregular=True,
    ),
]
