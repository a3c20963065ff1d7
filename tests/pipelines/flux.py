"""FLUX.1: text, image-to-image, inpainting, Fill, Kontext, ControlNet, and other samplers."""

from functools import partial
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, mask, picture, quiet, tiny

CHANNELS = 4
"""Of the latents; 16 once packed."""
MODEL = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def build(cls=FluxPipeline, scheduler=None, model=None, **components):
    """A FLUX pipeline of that class around tiny components, without text encoders."""
    return quiet(
        cls(
            scheduler=scheduler() if scheduler else euler(),
            vae=autoencoder(CHANNELS, shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny(FluxTransformer2DModel, **(MODEL | (model or {}))),
            **{name: make() for name, make in components.items()},
        )
    )


def euler():
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 16, "width": 24 if larger else 16}


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "pooled_prompt_embeds": drawn(2, 1, WIDTH),
        "guidance_scale": 3.5,
        **size(larger),
    }


def true_cfg(larger: bool) -> dict[str, Any]:
    return text(larger) | {
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_pooled_prompt_embeds": drawn(4, 1, WIDTH),
        "true_cfg_scale": 2.0,
    }


def with_picture(text, larger: bool, **more) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))} | more


def with_mask(text, larger: bool, **more) -> dict[str, Any]:
    return with_picture(text, larger, mask_image=mask(**size(larger)), **more)


def kontext(larger: bool) -> dict[str, Any]:
    area = 16 * 24 if larger else 16 * 16
    return with_picture(true_cfg, larger, max_area=area, _auto_resize=False)


def controlled(text, larger: bool) -> dict[str, Any]:
    return text(larger) | {"control_image": picture(6, **size(larger))}


def make_controlnet():
    return tiny(FluxControlNetModel, 1, **MODEL)


def flow_solver(cls):
    return cls(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )


CONTROL = {"cls": FluxControlNetPipeline, "controlnet": make_controlnet}
FILL = {"in_channels": 4 * (2 * CHANNELS + 4), "out_channels": 4 * CHANNELS}

CASES = [
    Case(name="flux", build=build, arguments=text),
    Case(name="flux-true-cfg", build=build, arguments=true_cfg, calls_a_step=2),
    Case(
        name="flux-img2img",
        build=partial(build, FluxImg2ImgPipeline),
        arguments=partial(with_picture, text, strength=0.5),
        strength=0.5,
    ),
    Case(
        name="flux-img2img-true-cfg",
        build=partial(build, FluxImg2ImgPipeline),
        arguments=partial(with_picture, true_cfg, strength=0.5),
        strength=0.5,
        calls_a_step=2,
    ),
    Case(
        name="flux-inpaint-true-cfg",
        build=partial(build, FluxInpaintPipeline),
        arguments=partial(with_mask, true_cfg, strength=0.5),
        strength=0.5,
        calls_a_step=2,
    ),
    Case(
        name="flux-fill",
        build=partial(build, FluxFillPipeline, model=FILL),
        arguments=partial(with_mask, text),
    ),
    Case(
        name="flux-kontext-true-cfg",
        build=partial(build, FluxKontextPipeline),
        arguments=kontext,
        calls_a_step=2,
    ),
    Case(
        name="flux-controlnet",
        build=partial(build, **CONTROL),
        arguments=partial(controlled, text),
        denoisers=("transformer", "controlnet"),
        calls_a_step=2,
    ),
    Case(
        name="flux-unipc",
        build=partial(build, scheduler=partial(flow_solver, UniPCMultistepScheduler)),
        arguments=text,
    ),
    Case(
        name="flux-dpmsolver",
        build=partial(build, scheduler=partial(flow_solver, DPMSolverMultistepScheduler)),
        arguments=text,
    ),
]
