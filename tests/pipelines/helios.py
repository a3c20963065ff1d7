"""Helios: chunk after chunk of frames, a sampling loop for each, or for each resolution of it."""

from functools import partial
from typing import Any

from diffusers import (
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import quiet, tiny

MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": wan.MODEL["text_dim"],
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_dim": (4, 4, 4),
}


class PyramidOfTwo(HeliosPyramidPipeline):
    """Takes its number of steps as other pipelines do, and shares it between two resolutions."""

    def __call__(self, num_inference_steps: int, **arguments: Any) -> Any:
        steps = [num_inference_steps - num_inference_steps // 2, num_inference_steps // 2]
        return super().__call__(pyramid_num_inference_steps_list=steps, **arguments)


def build(cls=HeliosPipeline, stages: int = 1):
    """A Helios pipeline of that class around tiny components, without a text encoder."""
    ends = [i / stages for i in range(stages + 1)]
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=wan.autoencoder(),
            scheduler=HeliosScheduler(stages=stages, stage_range=ends, gamma=0.3),
            transformer=tiny(HeliosTransformer3DModel, **MODEL),
        )
    )


def chunks(larger: bool) -> dict[str, Any]:
    """Two chunks of two latent frames."""
    more = {"num_frames": 10, "num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1]}
    return wan.text(larger) | more


CASES = [
    Case(name="helios", irregular=True, build=build, arguments=chunks, calls_a_step=None),
    Case(
        name="helios-pyramid",
        irregular=True,
        build=partial(build, PyramidOfTwo, stages=2),
        arguments=chunks,
        calls_a_step=None,
    ),
]
