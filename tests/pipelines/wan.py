"""Wan: one or two experts, from text, from a picture, from a clip, under control."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny
from tests.pipelines.video_stand_ins import (
    IMAGE_WIDTH,
    clip,
    clip_image_encoder,
    clip_image_processor,
)

CHANNELS = 16
"""Of the latents."""
EXPERTS = ("transformer", "transformer_2")
MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WITH_PICTURE = {"in_channels": 2 * CHANNELS + 4}
"""Latents, those of the picture, and 4 channels of the mask."""
WITH_EMBEDDED_PICTURE = WITH_PICTURE | {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 24}
"""And tokens of the picture beside those of the text."""


def build(cls=WanPipeline, model=None, *, experts=1, control=False, **more: Any):
    """A Wan pipeline of that class; ``more`` are further arguments of it, components made anew."""
    kind = WanVACETransformer3DModel if control else WanTransformer3DModel
    models = [tiny(kind, **(MODEL | (model or {}))) for _ in range(experts)]
    if experts > 1:
        nudge_(models[1])
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=autoencoder(),
            scheduler=unipc(),
            **dict(zip(EXPERTS, models, strict=False)),
            **{name: make() if callable(make) else make for name, make in more.items()},
        )
    )


def nudge_(model: torch.nn.Module) -> None:
    """Make it an expert that agrees roughly with the other one, as trained ones do."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += 0.2 * weight.data.abs().mean() * noise


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def autoencoder() -> AutoencoderKLWan:
    """Clips to latents of an eighth of the height and width and a quarter of the frames."""
    return tiny(
        AutoencoderKLWan,
        10,
        base_dim=3,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 64 if larger else 32}


def text(larger: bool, guidance: float = 4.0) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "guidance_scale": guidance,
        "num_frames": 13 if larger else 9,
        **size(larger),
    }


def with_picture(larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))}


def with_clip(larger: bool, strength: float) -> dict[str, Any]:
    arguments = text(larger)
    frames = arguments.pop("num_frames")
    return arguments | {"video": clip(6, frames, **size(larger)), "strength": strength}


def make(name: str, arguments=text, calls_a_step: int = 2, more=None, **options: Any) -> Case:
    """A case with guidance in two calls; ``options`` are those of ``build``."""
    return Case(
        name=name,
        build=partial(build, **options),
        arguments=arguments,
        calls_a_step=calls_a_step,
        denoisers=EXPERTS[: options.get("experts", 1)],
        irregular="experts" in options,  # the second one's first call is always computed
        **(more or {}),
    )


TWO = {"experts": 2, "boundary_ratio": 0.8}
PER_TOKEN = {"expand_timesteps": True}
"""The 5B model of Wan 2.2: every token has its timestep, 0 where the picture is given."""
FROM_PICTURE = {"cls": WanImageToVideoPipeline, "arguments": with_picture}

CASES = [
    make("wan21-t2v"),
    make("wan21-t2v-unguided", partial(text, guidance=1.0), calls_a_step=1),
    make("wan22-t2v", **TWO),
    make("wan22-5b-t2v", **PER_TOKEN),
    make(
        "wan21-i2v",
        **FROM_PICTURE,
        model=WITH_EMBEDDED_PICTURE,
        image_encoder=clip_image_encoder,
        image_processor=clip_image_processor,
    ),
    make("wan22-i2v", **FROM_PICTURE, model=WITH_PICTURE, **TWO),
    make("wan22-5b-i2v", **FROM_PICTURE, **PER_TOKEN),
    make(
        "wan21-v2v",
        partial(with_clip, strength=0.5),
        more={"strength": 0.5},
        cls=WanVideoToVideoPipeline,
    ),
    make(
        "wan21-vace",
        cls=WanVACEPipeline,
        control=True,
        model={"vace_layers": [0], "vace_in_channels": 2 * CHANNELS + 64},
    ),
]
