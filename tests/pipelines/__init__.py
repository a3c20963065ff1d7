"""Tiny pipelines of diffusers with drawn weights: ``CASES`` by name, no downloads."""

from importlib import import_module
from pkgutil import iter_modules

from tests.pipelines.case import Case, counted_calls, evaluations, flat, run

NO_FAMILIES = ("case", "stand_ins", "video_stand_ins")
FAMILIES = [
    import_module(f"{__name__}.{module.name}")
    for module in iter_modules(__path__)
    if module.name not in NO_FAMILIES
]
"""Modules with a list ``CASES`` each."""

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.CASES}


def _kind(case: Case) -> tuple:
    calls = (case.calls_a_step, case.order, case.extra_evaluations)
    return (case.denoisers, *calls, case.irregular, case.stochastic)


ONE_OF_A_KIND = frozenset(
    {
        (family.__name__, _kind(case)): case.name
        for family in FAMILIES
        for case in reversed(family.CASES)
    }.values()
)
"""Names of the first case of every family that calls its denoisers, and samples, as it does."""

__all__ = ["CASES", "ONE_OF_A_KIND", "Case", "counted_calls", "evaluations", "flat", "run"]
