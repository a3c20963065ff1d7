"""CogVideoX: DDIM and the sampler that draws noise, from text, picture, and clip."""

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny
from tests.pipelines.video_stand_ins import clip

CHANNELS = 4
"""Of the latents."""
MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
WITH_PICTURE = {
    "in_channels": 2 * CHANNELS,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}
"""As the 5B model from pictures; another shape than this one's own is not taken."""
VERSION_15 = {
    "in_channels": 2 * CHANNELS,
    "use_rotary_positional_embeddings": True,
    "patch_size_t": 2,
    "ofs_embed_dim": 8,
    "sample_width": 6,
    "patch_bias": False,
}
"""CogVideoX 1.5: patches of two frames, and an offset embedding."""


def build(cls=CogVideoXPipeline, scheduler=CogVideoXDDIMScheduler, model=None):
    """A CogVideoX pipeline of that class around tiny components, without a text encoder."""
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=autoencoder(),
            transformer=tiny(CogVideoXTransformer3DModel, **(MODEL | (model or {}))),
            scheduler=scheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=1.0,
                timestep_spacing="trailing",
            ),
        )
    )


def autoencoder() -> AutoencoderKLCogVideoX:
    """Clips to latents of an eighth of the height and width and a quarter of the frames."""
    return tiny(
        AutoencoderKLCogVideoX,
        10,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 48 if larger else 32}


def prompts(batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, batch, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(2, batch, TEXT, WIDTH),
    }


def text(larger: bool, **more: Any) -> dict[str, Any]:
    return prompts() | {"num_frames": 9, "guidance_scale": 4.0, **size(larger), **more}


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))}


def with_picture_twice(larger: bool) -> dict[str, Any]:
    """The learned positions take one shape alone: two clips in place of a larger one."""
    batch = 2 if larger else 1
    return with_picture(False) | prompts(batch) | {"image": picture(5, **size(False), batch=batch)}


def with_clip(larger: bool, name: str = "video", **more: Any) -> dict[str, Any]:
    arguments = text(larger, **more)
    del arguments["num_frames"]
    return arguments | {name: clip(6, 9, **size(larger))}


CASES = [
    Case(name="cogvideox-ddim", build=build, arguments=text),
    Case(
        name="cogvideox-dpm",
        build=partial(build, scheduler=CogVideoXDPMScheduler),
        arguments=partial(text, use_dynamic_cfg=True),
        stochastic=True,
    ),
    Case(name="cogvideox-unguided", build=build, arguments=partial(text, guidance_scale=1.0)),
    Case(
        name="cogvideox-i2v",
        build=partial(build, CogVideoXImageToVideoPipeline, CogVideoXDPMScheduler, WITH_PICTURE),
        arguments=with_picture_twice,
        stochastic=True,
    ),
    Case(
        name="cogvideox-15-i2v",
        build=partial(build, CogVideoXImageToVideoPipeline, model=VERSION_15),
        arguments=with_picture,
    ),
    Case(
        name="cogvideox-v2v",
        build=partial(build, CogVideoXVideoToVideoPipeline),
        arguments=partial(with_clip, strength=0.5),
        strength=0.5,
    ),
    Case(
        name="cogvideox-fun-control",
        build=partial(build, CogVideoXFunControlPipeline, model={"in_channels": 2 * CHANNELS}),
        arguments=partial(with_clip, name="control_video"),
    ),
]
