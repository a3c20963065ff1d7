"""Tiny pipelines of diffusers with drawn weights: ``CASES`` by name, no downloads."""

from tests.pipelines import (
    chroma,
    cogview3,
    flux,
    flux2,
    flux_descendants,
    hidream,
    kandinsky5_image,
    learned_variance,
    pag,
    pixart,
    qwenimage,
    sd3,
    stable_audio,
    stable_diffusion,
    unet_samplers,
    z_image,
)
from tests.pipelines.case import Case, counted_calls, evaluations, flat, run

FAMILIES = [
    chroma,
    cogview3,
    flux,
    flux2,
    flux_descendants,
    hidream,
    kandinsky5_image,
    learned_variance,
    pag,
    pixart,
    qwenimage,
    sd3,
    stable_audio,
    stable_diffusion,
    unet_samplers,
    z_image,
]
"""Modules with a list ``CASES`` each."""

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.CASES}

__all__ = ["CASES", "Case", "counted_calls", "evaluations", "flat", "run"]
