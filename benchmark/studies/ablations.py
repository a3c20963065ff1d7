"""What each part of AdaCorrection brings at equal compute.

Variants that lack or change one part are swept over what sets their compute, and compared at the
same compute fractions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmark.errors import BenchmarkError
from benchmark.models.package import evenly_spaced
from benchmark.run.rows import cached_row
from benchmark.settings import Settings
from benchmark.studies.ablation_report import at_fractions, contributions, render, tables
from benchmark.studies.ablation_variants import VARIANTS, Variant
from benchmark.studies.catalogue import AblationOptions
from benchmark.studies.session import compared_pictures, kept_pictures, opened

FIRST_TOLERANCE = 0.008
TOLERANCE_RANGE = 2.0**7
"""The sweep of a tolerance goes no further than this above and below the first one."""


def refresh_counts(steps: int, fractions: Sequence[float]) -> list[int]:
    """Numbers of refreshes, rising, next to these shares of the steps; at least two."""
    shares = [fraction * steps for fraction in fractions]
    counts = {count for share in shares for count in (math.floor(share), math.ceil(share))}
    return sorted({max(count, 2) for count in counts})


def sweep_tolerances(measure: Callable[[float], float], fractions: Sequence[float]) -> list[float]:
    """Tolerances, rising, whose compute fractions enclose ``fractions``.

    ``measure(tolerance)`` gives the compute fraction, which falls with it. From `FIRST_TOLERANCE`
    the tolerance is doubled and halved until one is below all fractions and one above, but for
    `TOLERANCE_RANGE`.
    """
    first = measure(FIRST_TOLERANCE)
    tolerances = [FIRST_TOLERANCE]
    for factor, is_beyond in (
        (2.0, lambda fraction: fraction <= min(fractions)),
        (0.5, lambda fraction: fraction >= max(fractions)),
    ):
        scale, fraction = 1.0, first
        while not is_beyond(fraction) and 1 / TOLERANCE_RANGE < scale < TOLERANCE_RANGE:
            scale *= factor
            tolerances.append(FIRST_TOLERANCE * scale)
            fraction = measure(tolerances[-1])
    return sorted(tolerances)


class VariantSweeps:
    """All variants on the same prompts; every row is kept as soon as it is finished.

    Args:
        store: where rows and the uncached pictures are kept.
        make: makes a row's pictures, `generate.Generated`.
        uncached: the row that all are compared with.
        psnr: PSNR in dB of each picture or clip.
        fractions: compute fractions at which the variants are compared.
    """

    def __init__(
        self,
        store: Any,
        make: Callable[[Any], Any],
        *,
        uncached: Any,
        psnr: Callable[[Any, Any], list[float]],
        fractions: Sequence[float],
    ) -> None:
        self.store, self.make, self.uncached, self.psnr = store, make, uncached, psnr
        self.fractions = sorted(fractions)
        self.steps = uncached.num_inference_steps
        self.reference = kept_pictures(store, uncached, make)

    def row(self, variant: Variant, options: Mapping[str, Any]) -> dict[str, Any]:
        """Per-picture compute fractions and PSNR of a variant with these options."""
        config = variant.at(next(iter(options.values())))
        row = cached_row(variant.name, self.steps, config, self.uncached.solver)
        return self.store.kept_row(
            row.key, lambda: compared_pictures(row, self.make(row), self.reference, self.psnr)
        )

    def sweep(self, variant: Variant) -> list[dict[str, Any]]:
        """Rows of a variant around the compute fractions of interest."""
        counts = refresh_counts(self.steps, self.fractions)
        if variant.knob == "schedule":
            settings = [evenly_spaced(range(self.steps), count) for count in counts]
        elif variant.knob == "target_compute":
            settings = [count / self.steps for count in counts]
        else:

            def measure(tolerance: float) -> float:
                return fmean(self.row(variant, {variant.knob: tolerance})["compute_fraction"])

            settings = sweep_tolerances(measure, self.fractions)
        return [self.row(variant, {variant.knob: value}) for value in settings]

    def results(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Sweeps, and the variants and parts at equal compute."""
        sweeps = {variant.name: self.sweep(variant) for variant in variants}
        found = at_fractions(sweeps, self.fractions)
        return {"variants": found, "parts": contributions(found), "sweeps": sweeps}


def chosen_variants(names: Sequence[str] | None) -> list[Variant]:
    """The variants of these names, all without; `BenchmarkError` for an unknown one."""
    known = {variant.name: variant for variant in VARIANTS}
    for name in names or ():
        if name not in known:
            accepted = "; ".join(known)
            raise BenchmarkError(f"--variants: unknown variant {name!r}; accepted: {accepted}")
    return [variant for name, variant in known.items() if names is None or name in names]


def run(settings: Settings, options: AblationOptions, console: Console) -> None:
    """Sweep all variants, then write ``results.json`` and ``report.md``."""
    variants, fractions = chosen_variants(options.variants), sorted(options.compute_fractions)
    with opened(settings, console, {"compute_fractions": fractions}) as session:
        bench = session.bench
        sweeps = VariantSweeps(
            bench.store,
            session.make,
            uncached=bench.uncached_row(settings.num_inference_steps[0]),
            psnr=session.psnr,
            fractions=fractions,
        )
        found = {"prompts": bench.entries, **sweeps.results(variants)}
    session.write(found, render, tables)
