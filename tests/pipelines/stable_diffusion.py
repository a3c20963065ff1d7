"""Stable Diffusion 1.5 and XL: UNets, many samplers, ControlNet, perturbed attention."""

from functools import partial
from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import (
    TEXT,
    WIDTH,
    autoencoder,
    clip_encoder,
    clip_tokenizer,
    drawn,
    mask,
    picture,
    quiet,
    tiny,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "timestep_spacing": "leading"}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8}
TIME = 4
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME,
    "projection_class_embeddings_input_dim": 6 * TIME + WIDTH,
    "use_linear_projection": True,
}


def ddim():
    return DDIMScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=False)


def pndm():
    return PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)


def build(scheduler, cls=StableDiffusionPipeline, in_channels=4, controlnet=None, **more):
    """A pipeline of Stable Diffusion 1.5 with its text encoder."""
    return quiet(
        cls(
            vae=autoencoder(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            unet=tiny(UNet2DConditionModel, in_channels=in_channels, **UNET, **UP),
            scheduler=scheduler() if scheduler in (ddim, pndm) else scheduler(**BETAS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **({"controlnet": controlnet()} if controlnet else {}),
            **more,
        )
    )


def build_xl():
    return quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=tiny(UNet2DConditionModel, **UNET, **UP, **XL),
            scheduler=EulerDiscreteScheduler(**BETAS, **LEADING),
            add_watermarker=False,
        )
    )


def make_controlnet():
    return tiny(ControlNetModel, 1, **UNET, conditioning_embedding_out_channels=(8, 16))


def size(larger: bool) -> dict[str, int]:
    return {"height": 16, "width": 24 if larger else 16}


def words(larger: bool) -> dict[str, Any]:
    return {"prompt": "a b c", "negative_prompt": "d", "guidance_scale": 3.0}


def text(larger: bool) -> dict[str, Any]:
    return words(larger) | size(larger)


def unguided(larger: bool) -> dict[str, Any]:
    return {"prompt": "a b c", "guidance_scale": 0.0} | size(larger)


def more_pictures(larger: bool) -> dict[str, Any]:
    return text(False) | {"num_images_per_prompt": 2 if larger else 1}


def img2img(larger: bool) -> dict[str, Any]:
    return words(larger) | {"image": picture(5, **size(larger)), "strength": 0.5}


def inpaint(larger: bool) -> dict[str, Any]:
    sides = size(larger)
    return text(larger) | {"image": picture(5, **sides), "mask_image": mask(**sides)}


def control(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(6, **size(larger))}


def xl(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "pooled_prompt_embeds": drawn(2, 1, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_pooled_prompt_embeds": drawn(4, 1, WIDTH),
        "guidance_scale": 3.0,
        **size(larger),
    }


def case(name, scheduler, arguments=text, cls=StableDiffusionPipeline, **more):
    """A case of Stable Diffusion 1.5 with that sampler."""
    components = more.pop("components", {})
    return Case(
        name=name,
        build=partial(build, scheduler, cls, **components),
        arguments=arguments,
        **({"denoisers": ("unet",)} | more),
    )


CASES = [
    case("sd-ddim", ddim, more_pictures),
    case("sd-pndm", pndm, extra_evaluations=1),
    case("sd-euler", EulerDiscreteScheduler),
    case("sd-euler-unguided", EulerDiscreteScheduler, unguided),
    case("sd-heun", HeunDiscreteScheduler, order=2),
    case("sd-dpmsolver", DPMSolverMultistepScheduler),
    case("sd-euler-ancestral", EulerAncestralDiscreteScheduler, stochastic=True),
    case("sd-img2img", ddim, img2img, StableDiffusionImg2ImgPipeline, strength=0.5),
    case("sd-inpaint", ddim, inpaint, StableDiffusionInpaintPipeline),
    case(
        "sd-inpaint-nine-channels",
        ddim,
        inpaint,
        StableDiffusionInpaintPipeline,
        components={"in_channels": 9},
    ),
    case(
        "sd-controlnet",
        ddim,
        control,
        StableDiffusionControlNetPipeline,
        denoisers=("unet", "controlnet"),
        calls_a_step=2,
        components={"controlnet": make_controlnet},
    ),
    case(
        "sd-pag",
        ddim,
        text,
        StableDiffusionPAGPipeline,
        components={"pag_applied_layers": "mid"},
    ),
    Case(name="sdxl", build=build_xl, arguments=xl, denoisers=("unet",)),
]
