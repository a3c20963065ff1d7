"""LTX-Video from text, from a picture, and from conditions, with packed latents."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXI2VLongMultiPromptPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import (
    TEXT,
    WIDTH,
    drawn,
    picture,
    quiet,
    t5_encoder,
    t5_tokenizer,
    tiny,
)

CHANNELS = 8
"""Of the latents."""
MODEL = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": WIDTH,
}


SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}


def build(cls=LTXPipeline, shift=SHIFT, text_encoder=None, tokenizer=None):
    """An LTX pipeline of that class around tiny components; those of the text if made here."""
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
            vae=autoencoder(),
            text_encoder=text_encoder and text_encoder(),
            tokenizer=tokenizer and tokenizer(),
            transformer=tiny(LTXVideoTransformer3DModel, **MODEL),
        )
    )


def autoencoder() -> AutoencoderKLLTXVideo:
    """Clips to latents of a 32nd of the height and width and an eighth of the frames."""
    return tiny(
        AutoencoderKLLTXVideo,
        10,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 96, "width": 128 if larger else 96}


def text(larger: bool, guidance: float = 3.0) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "guidance_scale": guidance,
        "num_frames": 17,
        **size(larger),
    }


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))}


def conditioned(larger: bool) -> dict[str, Any]:
    return with_picture(larger) | {"image_cond_noise_scale": 0.15}


def windows(larger: bool) -> dict[str, Any]:
    """A loop for each of two windows of 3 latent frames; the last timestep is never sampled."""
    return {
        "prompt": "a b|c d",
        "negative_prompt": "e",
        "guidance_scale": 3.0,
        "max_sequence_length": 8,
        "num_frames": 33,
        "temporal_tile_size": 24,
        "temporal_overlap": 8,
        "seed": None,
        **size(larger),
    }


CASES = [
    Case(name="ltx", build=build, arguments=text),
    Case(name="ltx-unguided", build=build, arguments=partial(text, guidance=1.0)),
    Case(name="ltx-i2v", build=partial(build, LTXImageToVideoPipeline), arguments=with_picture),
    Case(
        name="ltx-condition",
        build=partial(build, LTXConditionPipeline, {"shift": 3.0}),
        arguments=conditioned,
    ),
    Case(
        name="ltx-windows",
        irregular=True,
        build=partial(
            build, LTXI2VLongMultiPromptPipeline, {"shift": 3.0}, t5_encoder, t5_tokenizer
        ),
        arguments=windows,
        calls_a_step=None,
    ),
]
