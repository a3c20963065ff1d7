"""Qwen-Image: text, image-to-image, edits; guided in two named calls."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, picture, quiet, tiny

CHANNELS = 4


class PoolingEncoder(ModelMixin, ConfigMixin):
    """Pictures to latents by averages of 64x64: edits scale their picture to a megapixel first."""

    @register_to_config
    def __init__(self, z_dim: int = CHANNELS):
        super().__init__()
        self.temperal_downsample = [False] * 6
        self.mixing = torch.nn.Linear(3, z_dim)
        self.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """Latents [N, z_dim, T, H / 64, W / 64] of pictures [N, 3, T, H, W]."""
        averages = torch.nn.functional.avg_pool3d(pictures, (1, 64, 64))
        return SimpleNamespace(latents=self.mixing(averages.movedim(1, -1)).movedim(-1, 1))


def make_vae():
    return tiny(
        AutoencoderKLQwenImage,
        10,
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def make_pooling():
    return tiny(PoolingEncoder, 10)


def build(cls=QwenImagePipeline, vae=make_vae, **more):
    """A pipeline of that class without a text encoder."""
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(
                QwenImageTransformer2DModel,
                in_channels=4 * CHANNELS,
                out_channels=CHANNELS,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(8, 4, 4),
            ),
            **more,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "height": 16,
        "width": 24 if larger else 16,
    }


def guided(larger: bool) -> dict[str, Any]:
    return text(larger) | {
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "true_cfg_scale": 2.0,
    }


def img2img(larger: bool) -> dict[str, Any]:
    arguments = guided(larger)
    image = picture(5, arguments["height"], arguments["width"])
    return arguments | {"image": image, "strength": 0.5}


def edit(larger: bool) -> dict[str, Any]:
    grey = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    return guided(larger) | {"image": grey, "height": 256, "width": 384 if larger else 256}


CASES = [
    Case(name="qwenimage", build=build, arguments=guided, calls_a_step=2),
    Case(name="qwenimage-unguided", build=build, arguments=text),
    Case(
        name="qwenimage-img2img",
        build=partial(build, QwenImageImg2ImgPipeline),
        arguments=img2img,
        strength=0.5,
        calls_a_step=2,
    ),
    *(
        Case(
            name=name,
            build=partial(build, cls, make_pooling, processor=None),
            arguments=edit,
            calls_a_step=2,
        )
        for name, cls in (
            ("qwenimage-edit", QwenImageEditPipeline),
            ("qwenimage-edit-plus", QwenImageEditPlusPipeline),
        )
    ),
]
