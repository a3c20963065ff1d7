"""Tiny pipelines of diffusers with drawn weights: ``CASES`` by name, no downloads."""

from tests.pipelines import flux, flux2, sd3, stable_diffusion
from tests.pipelines.case import Case, counted_calls, evaluations, flat, run

FAMILIES = [
    flux,
    flux2,
    sd3,
    stable_diffusion,
]
"""Modules with a list ``CASES`` each."""

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.CASES}

__all__ = ["CASES", "Case", "counted_calls", "evaluations", "flat", "run"]
