"""Perturbed-attention guidance: one batch of three, and attention processors that are swapped."""

from functools import partial
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    StableDiffusion3PAGPipeline,
)

from tests.pipelines import pixart, sana, sd3
from tests.pipelines.case import Case

LAYER = "transformer_blocks.1"


def perturbed(arguments, larger: bool) -> dict[str, Any]:
    return arguments(larger) | {"pag_scale": 2.0}


def build(cls, transformer, scheduler):
    return pixart.build(partial(cls, pag_applied_layers=LAYER), transformer, scheduler)


CASES = [
    Case(
        name="pixart-sigma-pag",
        build=partial(build, PixArtSigmaPAGPipeline, pixart.make_pixart, sana.flow_solver),
        arguments=partial(perturbed, partial(pixart.text, side=64)),
    ),
    Case(
        name="sana-pag",
        build=partial(build, SanaPAGPipeline, sana.make_sana, FlowMatchEulerDiscreteScheduler),
        arguments=partial(perturbed, partial(pixart.text, side=256)),
    ),
    Case(
        name="sd3-pag",
        build=partial(
            sd3.build, partial(StableDiffusion3PAGPipeline, pag_applied_layers="blocks.1")
        ),
        arguments=partial(perturbed, sd3.text),
    ),
]
