"""DiT: pictures of a class."""

from typing import Any

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import autoencoder, quiet, tiny


def build(scheduler=DDIMScheduler):
    return quiet(
        DiTPipeline(
            transformer=tiny(
                DiTTransformer2DModel,
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                sample_size=8,
                num_embeds_ada_norm=1000,
            ),
            vae=autoencoder(),
            scheduler=scheduler(),
        )
    )


def labels(larger: bool) -> dict[str, Any]:
    return {"class_labels": [3, 5] if larger else [3], "guidance_scale": 3.0}


CASES = [
    Case(name="dit", build=build, arguments=labels, output_type="np"),
]
