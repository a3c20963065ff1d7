"""Tiny pipelines of diffusers with drawn weights: ``CASES`` by name, no downloads."""

from tests.pipelines import (
    auraflow,
    chroma,
    cogview,
    dit,
    ernie_image,
    flux,
    flux2,
    flux_descendants,
    hidream,
    hunyuan_image,
    hunyuandit,
    kandinsky5_image,
    learned_variance,
    lumina,
    pag,
    pixart,
    prx,
    qwenimage,
    sana,
    sd3,
    stable_audio,
    stable_diffusion,
    unet_samplers,
    z_image,
)
from tests.pipelines.case import Case, counted_calls, evaluations, flat, run

FAMILIES = [
    auraflow,
    chroma,
    cogview,
    dit,
    ernie_image,
    flux,
    flux2,
    flux_descendants,
    hidream,
    hunyuan_image,
    hunyuandit,
    kandinsky5_image,
    learned_variance,
    lumina,
    pag,
    pixart,
    prx,
    qwenimage,
    sana,
    sd3,
    stable_audio,
    stable_diffusion,
    unet_samplers,
    z_image,
]
"""Modules with a list ``CASES`` each."""

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.CASES}

__all__ = ["CASES", "Case", "counted_calls", "evaluations", "flat", "run"]
