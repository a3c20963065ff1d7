"""DeepFloyd IF and Kandinsky 2.2: UNets that predict a variance, which their sampler uses."""

from typing import Any

from diffusers import (
    DDPMScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    UNet2DConditionModel,
    VQModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stable_diffusion import UNET, UP
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def build_if():
    return quiet(
        IFPipeline(
            tokenizer=None,
            text_encoder=None,
            unet=tiny(UNet2DConditionModel, in_channels=3, out_channels=6, **UNET, **UP),
            scheduler=DDPMScheduler(
                beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
            ),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 24 if larger else 16,
    }


def build_kandinsky22():
    unet = UNET | {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "addition_embed_type": "image",
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "image_proj",
        "resnet_time_scale_shift": "scale_shift",
    }
    return quiet(
        KandinskyV22Pipeline(
            unet=tiny(UNet2DConditionModel, sample_size=8, in_channels=4, out_channels=8, **unet),
            scheduler=DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
            ),
            movq=tiny(
                VQModel,
                10,
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("AttnUpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
                num_vq_embeddings=8,
                vq_embed_dim=4,
            ),
        )
    )


def embedded_picture(larger: bool) -> dict[str, Any]:
    return {
        "image_embeds": drawn(1, 1, WIDTH),
        "negative_image_embeds": drawn(2, 1, WIDTH),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 24 if larger else 16,
    }


CASES = [
    Case(
        name="deepfloyd-if",
        build=build_if,
        arguments=text,
        denoisers=("unet",),
        output_type="pt",
        stochastic=True,
    ),
    Case(
        name="kandinsky22",
        build=build_kandinsky22,
        arguments=embedded_picture,
        denoisers=("unet",),
        stochastic=True,
    ),
]
