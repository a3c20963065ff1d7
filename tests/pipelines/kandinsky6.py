"""Kandinsky 6: video and audio out of one transformer, each with a scheduler of its own."""

from functools import partial
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
)

from tests.pipelines import hunyuan_video
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny

CHANNELS = hunyuan_video.CHANNELS
"""Of the video's latents."""
AUDIO_CHANNELS = 4
MODEL = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": WIDTH,
    "in_text_dim2": WIDTH,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "in_audio_dim": AUDIO_CHANNELS,
    "out_audio_dim": AUDIO_CHANNELS,
    "visual_token_type_num_embeddings": 2,
}


def build():
    """A Kandinsky 6 pipeline around tiny components, without text encoders."""
    return quiet(
        Kandinsky6TI2VAPipeline(
            transformer=tiny(Kandinsky6Transformer3DModel, **MODEL),
            vae=hunyuan_video.autoencoder(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            audio_vae=audio_autoencoder(),
            vocoder=vocoder(),
        )
    )


def audio_autoencoder() -> MMAudioVAE:
    """Sound to latents at a rate of 16 a second."""
    return tiny(
        MMAudioVAE,
        10,
        mel_bins=8,
        latent_channels=AUDIO_CHANNELS,
        hidden_channels=8,
        layers_per_block=1,
        sample_rate=16 * 128,
        n_fft=128,
        hop_length=64,
    )


def vocoder() -> MMAudioVocoder:
    return tiny(
        MMAudioVocoder,
        11,
        num_mels=8,
        upsample_initial_channel=4,
        upsample_rates=(2,),
        upsample_kernel_sizes=(4,),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 64 if larger else 32}


def text(larger: bool, **more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "pooled_prompt_embeds": drawn(2, 1, WIDTH),
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_pooled_prompt_embeds": drawn(4, 1, WIDTH),
        "guidance_scale": 4.0,
        "num_frames": 9,
        **size(larger),
        **more,
    }


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))}


CASES = [
    Case(name="kandinsky6", build=build, arguments=text, calls_a_step=2),
    Case(
        name="kandinsky6-silent",
        build=build,
        arguments=partial(text, sample_audio=False),
        calls_a_step=2,
    ),
    Case(name="kandinsky6-i2va", build=build, arguments=with_picture, calls_a_step=2),
]
