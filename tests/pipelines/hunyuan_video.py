"""HunyuanVideo from text and from a picture, FramePack's sections, and HunyuanVideo 1.5."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from PIL import Image

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny
from tests.pipelines.video_stand_ins import (
    IMAGE_WIDTH,
    clip_image_processor,
    siglip_image_encoder,
    siglip_image_processor,
)

CHANNELS = 4
"""Of the latents."""
WIDTHS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH,
    "rope_axes_dim": (4, 4, 4),
}
MODEL = WIDTHS | {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_single_layers": 2,
    "pooled_projection_dim": WIDTH,
}
FRAMEPACK_MODEL = MODEL | {
    "has_image_proj": True,
    "image_proj_dim": IMAGE_WIDTH,
    "has_clean_x_embedder": True,
}
MODEL_15 = WIDTHS | {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "text_embed_2_dim": WIDTH,
    "image_embed_dim": IMAGE_WIDTH,
    "target_size": 64,
}


def build(cls=HunyuanVideoPipeline, transformer=HunyuanVideoTransformer3DModel, model=None, **more):
    """A pipeline of HunyuanVideo; ``more`` are further components, made anew."""
    return quiet(
        cls(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny(transformer, **(MODEL | (model or {}))),
            vae=autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            **{name: make() for name, make in more.items()},
        )
    )


def autoencoder() -> AutoencoderKLHunyuanVideo:
    """Clips to latents of an eighth of the height and width and a quarter of the frames."""
    return tiny(
        AutoencoderKLHunyuanVideo,
        10,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def build_15(cls=HunyuanVideo15Pipeline, **more):
    """A pipeline of HunyuanVideo 1.5; ``more`` are further components, made anew."""
    pipe = cls(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny(HunyuanVideo15Transformer3DModel, **MODEL_15),
        vae=autoencoder_15(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        **{name: make() for name, make in more.items()},
    )
    pipe.vision_num_semantic_tokens = 4  # of a picture that is not there; 729 would be slow
    return quiet(pipe)


def autoencoder_15() -> AutoencoderKLHunyuanVideo15:
    """Clips to latents of a sixteenth of the height and width and a quarter of the frames."""
    return tiny(
        AutoencoderKLHunyuanVideo15,
        10,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 32, "width": 48 if larger else 32}


def prompt(seed: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": drawn(seed, 1, TEXT, WIDTH),
        f"{prefix}pooled_prompt_embeds": drawn(seed + 1, 1, WIDTH),
        f"{prefix}prompt_attention_mask": torch.ones(1, TEXT),
    }


def text(larger: bool) -> dict[str, Any]:
    frames = 9 if larger else 5
    return prompt(1) | {"guidance_scale": 6.0, "num_frames": frames, **size(larger)}


def true_cfg(larger: bool) -> dict[str, Any]:
    return text(larger) | prompt(3, "negative_") | {"true_cfg_scale": 3.0}


def with_picture(text, larger: bool) -> dict[str, Any]:
    return text(larger) | {"image": picture(5, **size(larger))}


def sections(larger: bool) -> dict[str, Any]:
    """Two sections of two latent frames, a sampling loop each."""
    return with_picture(text, larger) | {"num_frames": 10, "latent_window_size": 2}


def prompt_15(seed: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": drawn(seed, 1, TEXT, WIDTH),
        f"{prefix}prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.int64),
        f"{prefix}prompt_embeds_2": drawn(seed + 1, 1, TEXT, WIDTH),
        f"{prefix}prompt_embeds_mask_2": torch.ones(1, TEXT, dtype=torch.int64),
    }


def guided_15(larger: bool) -> dict[str, Any]:
    return prompt_15(1) | prompt_15(3, "negative_") | {"num_frames": 9 if larger else 5}


def text_15(larger: bool) -> dict[str, Any]:
    return guided_15(larger) | {"height": 64, "width": 96 if larger else 64}


def from_picture_15(larger: bool) -> dict[str, Any]:
    """The pipeline takes height and width from the picture and its model."""
    return guided_15(larger) | {"image": Image.new("RGB", (64, 64), (200, 90, 30))}


def image_case(name: str, condition: str, **model: Any) -> Case:
    return Case(
        name=name,
        build=partial(
            build,
            HunyuanVideoImageToVideoPipeline,
            model={"image_condition_type": condition, **model},
            image_processor=clip_image_processor,
        ),
        arguments=partial(with_picture, true_cfg),
        calls_a_step=2,
    )


CASES = [
    Case(name="hunyuan-video", build=build, arguments=text),
    Case(name="hunyuan-video-true-cfg", build=build, arguments=true_cfg, calls_a_step=2),
    image_case(
        "hunyuan-video-i2v-concat",
        "latent_concat",
        in_channels=2 * CHANNELS + 1,
        guidance_embeds=False,
    ),
    image_case("hunyuan-video-i2v-replace", "token_replace"),
    Case(
        name="hunyuan-video-framepack",
        irregular=True,
        build=partial(
            build,
            HunyuanVideoFramepackPipeline,
            HunyuanVideoFramepackTransformer3DModel,
            FRAMEPACK_MODEL,
            image_encoder=siglip_image_encoder,
            feature_extractor=siglip_image_processor,
        ),
        arguments=sections,
        calls_a_step=None,
    ),
    Case(name="hunyuan-video-15", build=build_15, arguments=text_15, calls_a_step=2),
    Case(
        name="hunyuan-video-15-i2v",
        build=partial(
            build_15,
            HunyuanVideo15ImageToVideoPipeline,
            image_encoder=siglip_image_encoder,
            feature_extractor=siglip_image_processor,
        ),
        arguments=from_picture_15,
        calls_a_step=2,
    ),
]
