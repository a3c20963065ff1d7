"""Stable Diffusion 1.5 under further samplers, with further kinds of guidance."""

from functools import partial
from typing import Any

from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    KDPM2DiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LMSDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from tests.pipelines.case import Case
from tests.pipelines.stable_diffusion import BETAS, UNET, UP, case, img2img, text
from tests.pipelines.stand_ins import autoencoder, clip_encoder, clip_tokenizer, quiet, tiny


def build_lcm():
    return quiet(
        LatentConsistencyModelPipeline(
            vae=autoencoder(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            unet=tiny(UNet2DConditionModel, **UNET, **UP, time_cond_proj_dim=8),
            scheduler=LCMScheduler(**BETAS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def lcm(larger: bool) -> dict[str, Any]:
    return {key: value for key, value in text(larger).items() if key != "negative_prompt"}


def instructed(larger: bool) -> dict[str, Any]:
    arguments = img2img(larger) | {"image_guidance_scale": 1.5}
    del arguments["strength"]
    return arguments


SDE = partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++")

CASES = [
    case("sd-ddpm", DDPMScheduler, stochastic=True),
    case("sd-dpmsolver-sde", SDE, stochastic=True),
    case("sd-dpmsolver-singlestep", DPMSolverSinglestepScheduler),
    case("sd-unipc", UniPCMultistepScheduler),
    case("sd-lms", LMSDiscreteScheduler),
    case("sd-kdpm2", KDPM2DiscreteScheduler, order=2),
    case(
        "sd-instruct-pix2pix",
        UniPCMultistepScheduler,
        instructed,
        StableDiffusionInstructPix2PixPipeline,
        components={"in_channels": 8},
    ),
    Case(name="sd-lcm", build=build_lcm, arguments=lcm, denoisers=("unet",), stochastic=True),
]
