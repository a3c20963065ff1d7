"""AnyFlow: a model of the mean velocity between two times, at once or chunk after chunk."""

from functools import partial
from typing import Any

from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
)

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import quiet, tiny

CHUNKS = (1, 2)
"""Latent frames of each."""
FAR_MODEL = {"chunk_partition": CHUNKS, "full_chunk_limit": 2, "attention_head_dim": 16}


def build(cls=AnyFlowPipeline, transformer=AnyFlowTransformer3DModel, model=None):
    """An AnyFlow pipeline of that class around tiny components, without a text encoder."""
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            transformer=tiny(transformer, **(wan.MODEL | (model or {}))),
            vae=wan.autoencoder(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        )
    )


def unguided(larger: bool) -> dict[str, Any]:
    arguments = wan.text(larger, guidance=1.0)
    del arguments["negative_prompt_embeds"]
    return arguments


def chunks(larger: bool) -> dict[str, Any]:
    """A loop for each chunk; between two, a call that fills the transformer's own cache."""
    return wan.text(False) | wan.size(larger)


CASES = [
    Case(name="anyflow", build=build, arguments=unguided),
    Case(name="anyflow-guided", build=build, arguments=wan.text),
    Case(
        name="anyflow-far",
        irregular=True,
        build=partial(build, AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FAR_MODEL),
        arguments=chunks,
        calls_a_step=None,
        steps=4,  # its attention is slow where it is not compiled
    ),
]
