"""LTX-2: video and audio out of one transformer, each with a scheduler of its own."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny

CHANNELS = 4
"""Of the video's latents."""
AUDIO_CHANNELS = 2
MEL_BINS = 8
"""Of a second of sound; a quarter of them in its latents."""
MODEL = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": AUDIO_CHANNELS * MEL_BINS // 4,
    "audio_out_channels": AUDIO_CHANNELS * MEL_BINS // 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": WIDTH,
    "rope_double_precision": False,
}
CONNECTORS = {
    "caption_channels": WIDTH,
    "text_proj_in_factor": 1,
    "video_connector_num_attention_heads": 2,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 1,
    "video_connector_num_learnable_registers": None,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": None,
    "rope_double_precision": False,
}


def build(cls=LTX2Pipeline):
    """An LTX-2 pipeline of that class around tiny components, without a text encoder."""
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
            ),
            vae=autoencoder(),
            audio_vae=audio_autoencoder(),
            text_encoder=None,
            tokenizer=None,
            connectors=tiny(LTX2TextConnectors, 1, **CONNECTORS),
            transformer=tiny(LTX2VideoTransformer3DModel, **MODEL),
            vocoder=None,
        )
    )


def autoencoder() -> AutoencoderKLLTX2Video:
    """Clips to latents of a 32nd of the height and width and an eighth of the frames."""
    return tiny(
        AutoencoderKLLTX2Video,
        10,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def audio_autoencoder() -> AutoencoderKLLTX2Audio:
    """Spectrograms to latents of a quarter of their bins and their length."""
    return tiny(
        AutoencoderKLLTX2Audio,
        10,
        base_channels=4,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 96, "width": 128 if larger else 96}


def text(larger: bool, **more: Any) -> dict[str, Any]:
    """Guidance by the prompt in one call alone, unless ``more`` asks for the other two."""
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "guidance_scale": 3.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "num_frames": 17,
        **size(larger),
        **more,
    }


def all_guidance(larger: bool) -> dict[str, Any]:
    """By the prompt, by a block left out, and by the other modality left out: three calls."""
    return text(
        larger,
        stg_scale=1.0,
        audio_stg_scale=1.0,
        modality_scale=3.0,
        audio_modality_scale=3.0,
        spatio_temporal_guidance_blocks=[1],
    )


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger)), "image_crf": 0}


def conditioned(larger: bool) -> dict[str, Any]:
    """The last latent frame is given, not quite."""
    frame = 255 * picture(5, **size(larger))
    condition = LTX2VideoCondition(frame, index=-1, strength=0.8, crf=0)
    return text(larger) | {"conditions": [condition]}


CASES = [
    Case(name="ltx2", build=build, arguments=text),
    Case(name="ltx2-three-guidances", build=build, arguments=all_guidance, calls_a_step=3),
    Case(name="ltx2-i2v", build=partial(build, LTX2ImageToVideoPipeline), arguments=with_picture),
    Case(
        name="ltx2-condition",
        build=partial(build, LTX2ConditionPipeline),
        arguments=conditioned,
    ),
]
