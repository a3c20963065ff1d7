"""Helios: chunk after chunk of frames, a sampling loop each, with a history."""

from typing import Any

from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

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


def build():
    """A Helios pipeline around tiny components, without a text encoder."""
    return quiet(
        HeliosPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan.autoencoder(),
            scheduler=HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
            transformer=tiny(HeliosTransformer3DModel, **MODEL),
        )
    )


def chunks(larger: bool) -> dict[str, Any]:
    """Two chunks of two latent frames."""
    more = {"num_frames": 10, "num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1]}
    return wan.text(larger) | more


CASES = [Case(name="helios", build=build, arguments=chunks, calls_a_step=None)]
