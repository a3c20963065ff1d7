"""Cosmos 1 (EDM, two scheduler steps a step), 2 (preconditioned), and 2.5 (UniPC)."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny
from tests.pipelines.video_stand_ins import clip

CHANNELS = 16
"""Of the latents, those of Wan's autoencoder too."""
MODEL = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (8, 16, 16),
    "concat_padding_mask": False,  # to resize it, the model takes another package
}
MASKED = {"in_channels": CHANNELS + 1}
"""With a channel that says which frames are given."""


class Trusting(nn.Module):
    """Finds every text and every video safe; the real one is another package."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def build(cls, scheduler, autoencoder=wan.autoencoder, model=None):
    """A Cosmos pipeline of that class around tiny components, without a text encoder."""
    return quiet(
        cls(
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(CosmosTransformer3DModel, **(MODEL | (model or {}))),
            vae=autoencoder(),
            scheduler=scheduler(),
            safety_checker=Trusting(),
        )
    )


def autoencoder_of_version_1() -> AutoencoderKLCosmos:
    """Clips to latents of an eighth of the height, width, and frames."""
    return tiny(
        AutoencoderKLCosmos,
        10,
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )


def edm() -> EDMEulerScheduler:
    return EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )


def karras_flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 48 if larger else 32}


def text(larger: bool, frames: int | None = 9) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "guidance_scale": 4.0,
        **({"num_frames": frames} if frames else {}),
        **size(larger),
    }


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger, 17) | {"image": picture(5, **size(larger))}


def with_clip(larger: bool) -> dict[str, Any]:
    return text(larger) | {"video": clip(6, 5, **size(larger))}


VERSION_1 = {"scheduler": edm, "autoencoder": autoencoder_of_version_1}
VERSION_2 = {"scheduler": karras_flow}

CASES = [
    Case(
        name="cosmos1-t2w",
        build=partial(build, CosmosTextToWorldPipeline, **VERSION_1),
        arguments=partial(text, frames=17),
        calls_a_step=2,
    ),
    Case(
        name="cosmos1-v2w",
        build=partial(build, CosmosVideoToWorldPipeline, **VERSION_1, model=MASKED),
        arguments=with_picture,
        calls_a_step=2,
    ),
    Case(
        name="cosmos2-t2i",
        build=partial(build, Cosmos2TextToImagePipeline, **VERSION_2),
        arguments=partial(text, frames=None),
        calls_a_step=2,
    ),
    Case(
        name="cosmos2-v2w",
        build=partial(build, Cosmos2VideoToWorldPipeline, **VERSION_2, model=MASKED),
        arguments=with_picture,
        calls_a_step=2,
    ),
    Case(
        name="cosmos25-t2w",
        build=partial(build, Cosmos2_5_PredictBasePipeline, wan.unipc, model=MASKED),
        arguments=text,
        calls_a_step=2,
    ),
    Case(
        name="cosmos25-v2w",
        build=partial(build, Cosmos2_5_PredictBasePipeline, wan.unipc, model=MASKED),
        arguments=with_clip,
        calls_a_step=2,
    ),
]
