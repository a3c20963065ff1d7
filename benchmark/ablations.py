"""What each part of AdaCorrection brings at equal compute.

Variants that lack or change one part are swept over what sets their compute, and compared at the
same compute fractions. `--help` lists the arguments.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.command import run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.study import kept_pictures, opened, study_parser, study_settings  # noqa: E402

OUTPUT = ROOT / "benchmark" / "results" / "ablations"
PASSED_ON = {
    "model_type": "flux",
    "model": None,
    "prompts": None,
    "judge": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "true_cfg_scale": None,
    "device": None,
    "dtype": None,
    "threads": None,
    "split": "development",
    "num_prompts": "6",
}
"""Name -> default."""
FRACTIONS = (0.25, 0.35)
"""Compute fractions at which the variants are compared."""
FIRST_TOLERANCE = 0.008
TOLERANCE_RANGE = 2.0**7
"""The sweep of a tolerance goes no further than this above and below the first one."""


def make_parser() -> Parser:
    parser = study_parser(
        "ablations.py",
        "What each part of AdaCorrection brings at equal compute.",
        PASSED_ON,
        "benchmark/results/ablations/FAMILY_STEPS",
        "The split is the development split by default, of which 6 prompts are taken.",
    )
    add = parser.add_argument
    add(
        "--compute_fractions",
        nargs="+",
        type=float,
        default=FRACTIONS,
        metavar="SHARE",
        help="where the variants are compared, each between 0 and 1 (0.25 0.35)",
    )
    add("--variants", nargs="+", metavar="NAME", help="only these, by their names in the report")
    return parser


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


class Study:
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
        fractions: Sequence[float] = FRACTIONS,
    ) -> None:
        self.store, self.make, self.uncached, self.psnr = store, make, uncached, psnr
        self.fractions = sorted(fractions)
        self.steps = uncached.num_inference_steps
        self.reference = kept_pictures(store, uncached, make)

    def row(self, variant: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Per-picture compute fractions and PSNR of a variant with these options."""
        from benchmark.plan import cached_row

        config = replace(variant.config, **options)
        row = cached_row(variant.name, self.steps, config, self.uncached.solver)
        if self.store.row(row.key) is None:
            with variant.switch():
                made = self.make(row)
            found = {
                "compute_fraction": [round(s.compute_fraction, 6) for s in made.summaries],
                "psnr_db": [round(value, 4) for value in self.psnr(made.pictures, self.reference)],
                "config": config.to_dict(),
            }
            self.store.save_row(row.key, found)
        return self.store.row(row.key)

    def sweep(self, variant: Any) -> list[dict[str, Any]]:
        """Rows of a variant around the compute fractions of interest."""
        from xfuser_adacorr.core.refreshes import evenly_spaced

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

    def results(self, variants: Sequence[Any]) -> dict[str, Any]:
        """Sweeps, and the variants and parts at equal compute."""
        from benchmark.ablation_report import at_fractions, contributions

        sweeps = {variant.name: self.sweep(variant) for variant in variants}
        found = at_fractions(sweeps, self.fractions)
        return {"variants": found, "parts": contributions(found), "sweeps": sweeps}


def chosen_variants(names: Sequence[str] | None) -> list[Any]:
    """The variants of these names, all without; `BenchmarkError` for an unknown one."""
    from benchmark.ablation_variants import VARIANTS

    known = {variant.name: variant for variant in VARIANTS}
    for name in names or ():
        if name not in known:
            accepted = "; ".join(known)
            raise BenchmarkError(f"--variants: unknown variant {name!r}; accepted: {accepted}")
    return [variant for name, variant in known.items() if names is None or name in names]


def run(argv: Sequence[str], console: Console) -> None:
    """Sweep all variants, then write ``results.json`` and ``report.md``."""
    given = make_parser().parse_args(argv)
    for share in given.compute_fractions:
        if not 0 < share < 1:
            raise BenchmarkError(f"--compute_fractions: must be between 0 and 1, got {share:g}")
    settings = study_settings(given, PASSED_ON, OUTPUT)
    variants = chosen_variants(given.variants)
    fractions = sorted(given.compute_fractions)

    from benchmark.ablation_report import render, tables

    with opened(settings, console, {"compute_fractions": fractions}) as session:
        bench = session.bench
        study = Study(
            bench.store,
            session.make,
            uncached=bench.uncached_row(settings.num_inference_steps[0]),
            psnr=session.psnr,
            fractions=fractions,
        )
        found = {"prompts": bench.entries, **study.results(variants)}
    session.write(found, render, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
