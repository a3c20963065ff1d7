"""Z-Image: its transformer takes and gives lists of tensors."""

from functools import partial
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny


def build():
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            transformer=tiny(
                ZImageTransformer2DModel,
                in_channels=4,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 2, 2],
                axes_lens=[256, 32, 32],
            ),
        )
    )


def text(larger: bool, guidance_scale: float) -> dict[str, Any]:
    return {
        "prompt_embeds": [drawn(1, TEXT, WIDTH)],
        "negative_prompt_embeds": [drawn(3, TEXT - 1, WIDTH)],
        "guidance_scale": guidance_scale,
        "height": 16,
        "width": 24 if larger else 16,
    }


CASES = [
    Case(name="z-image", build=build, arguments=partial(text, guidance_scale=3.0)),
    Case(
        name="z-image-unguided",
        build=build,
        arguments=partial(text, guidance_scale=0.0),
    ),
]
