"""AnyFlow: a model of the mean velocity between two times, called with both."""

from typing import Any

from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import quiet, tiny


def build():
    """An AnyFlow pipeline around tiny components, without a text encoder."""
    return quiet(
        AnyFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=tiny(AnyFlowTransformer3DModel, **wan.MODEL),
            vae=wan.autoencoder(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        )
    )


def unguided(larger: bool) -> dict[str, Any]:
    arguments = wan.text(larger, guidance=1.0)
    del arguments["negative_prompt_embeds"]
    return arguments


CASES = [
    Case(name="anyflow", build=build, arguments=unguided),
    Case(name="anyflow-guided", build=build, arguments=wan.text),
]
