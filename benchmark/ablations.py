"""What each part of AdaCorrection brings at equal compute.

Variants that lack or change one part are swept over what sets their compute, and compared at the
same compute fractions. `--help` lists the arguments.
"""

import math
import os
import sys
from argparse import Namespace
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
from benchmark.command import passed_on, run_command  # noqa: E402
from benchmark.errors import BenchmarkError  # noqa: E402
from benchmark.settings import Settings, read_settings  # noqa: E402

OUTPUT = ROOT / "benchmark" / "results" / "ablations"
PASSED_ON = (
    "model_type",
    "model",
    "prompts",
    "judge",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "device",
    "dtype",
    "threads",
    "split",
    "num_prompts",
)
FRACTIONS = (0.25, 0.35)
"""Compute fractions at which the variants are compared."""
FIRST_TOLERANCE = 0.008
TOLERANCE_RANGE = 2.0**7
"""The sweep of a tolerance goes no further than this above and below the first one."""


def make_parser() -> Parser:
    parser = Parser(
        prog="ablations.py",
        description="What each part of AdaCorrection brings at equal compute.",
        epilog="The other arguments are those of cache_execute.py; the split is the development "
        "split by default, of which 6 prompts are taken.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="new or empty (benchmark/results/ablations/FAMILY_STEPS)",
    )
    add(
        "--compute_fractions",
        nargs="+",
        type=float,
        default=FRACTIONS,
        metavar="SHARE",
        help="where the variants are compared, each between 0 and 1 (0.25 0.35)",
    )
    add("--variants", nargs="+", metavar="NAME", help="only these, by their names in the report")
    add("--resume", action="store_true", help="go on with an interrupted study")
    defaults = {"model_type": "flux", "split": "development", "num_prompts": "6"}
    for name in PASSED_ON:
        add(f"--{name}", metavar="X", default=defaults.get(name))
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
        kept = store.pictures(uncached.key)
        if kept is None:
            kept = make(uncached).pictures
            store.save_pictures(uncached.key, kept)
        self.reference = kept

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


def study_settings(given: Namespace) -> Settings:
    """The settings of the pictures; raises `BenchmarkError` for what is wrong."""
    for share in given.compute_fractions:
        if not 0 < share < 1:
            raise BenchmarkError(f"--compute_fractions: must be between 0 and 1, got {share:g}")
    settings = read_settings(["--output_dir=.", *passed_on(given, PASSED_ON)])
    steps = settings.num_inference_steps[0]
    directory = given.output_dir or OUTPUT / f"{settings.model_type}_{steps}"
    return replace(settings, output_dir=directory, resume=given.resume)


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
    settings = study_settings(given)

    from tqdm.auto import tqdm

    from benchmark.ablation_report import render, tables
    from benchmark.cache_execute import run_identity
    from benchmark.generate import generate_row
    from benchmark.loading import fingerprint, load_prompts
    from benchmark.metrics import psnr_db
    from benchmark.report import environment, write_study
    from benchmark.runner import Workbench, threads
    from benchmark.store import Store
    from benchmark.video_metrics import clip_psnr_db

    store = Store(settings.output_dir)
    store.check(settings.resume)
    variants = chosen_variants(given.variants)
    load_prompts(settings)
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    identity = run_identity(settings, fingerprint, threads(settings))
    fractions = sorted(given.compute_fractions)
    store.open({**identity, "compute_fractions": fractions}, settings.resume)

    with tqdm(desc="pictures", unit="picture", smoothing=0.05) as bar:

        def make(row: Any) -> Any:
            bar.set_postfix_str(row.name)
            return generate_row(bench.pipe, settings, row, bench.entries, bar.update)

        study = Study(
            store,
            make,
            uncached=bench.uncached_row(settings.num_inference_steps[0]),
            psnr=psnr_db if settings.num_frames is None else clip_psnr_db,
            fractions=fractions,
        )
        results = study.results(variants)
    document = {
        "schema": 1,
        "environment": environment(bench),
        "settings": settings.to_dict(),
        "prompts": bench.entries,
        **results,
    }
    write_study(store, document, render(document), tables(document), console)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
