"""What AdaCache's Motion Regularization gains at equal compute on Open-Sora's fast clips.

Ada without MoReg, with the published and with the relative one is swept over the scale of its
codebook. `--help` lists the arguments.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
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

OUTPUT = ROOT / "benchmark" / "results" / "moreg"
PASSED_ON = (
    "model",
    "config",
    "split",
    "num_prompts",
    "num_inference_steps",
    "guidance_scale",
    "device",
    "dtype",
    "threads",
)
LARGEST_SCALE = 2.0**14
"""The sweep goes no further than from its reciprocal to this."""


def make_parser() -> Parser:
    parser = study_parser(
        "moreg_study.py",
        "Ada with and without MoReg at equal compute, on fast and on slow clips.",
        dict.fromkeys(PASSED_ON),
        "benchmark/results/moreg",
    )
    parser.set_defaults(output_dir=OUTPUT)
    parser.add_argument(
        "--moreg_divisor",
        type=float,
        default=1.0,
        metavar="D",
        help="d of the published MoReg, which divides the motion, above 0 (1)",
    )
    return parser


def sweep_scales(
    measure: Callable[[float], Sequence[float]], fractions: Sequence[float]
) -> list[float]:
    """Scales, rising, between which the compute fractions measured pass all of ``fractions``.

    ``measure(scale)`` gives compute fractions, which fall with the scale. From 1 the scale is
    quadrupled and quartered until all are below and above, but for `LARGEST_SCALE`; where one
    passes, the geometric mean is measured too, and once more.
    """
    low, high = min(fractions), max(fractions)
    found = {1.0: measure(1.0)}
    scale = 1.0
    while max(found[scale]) > low and scale < LARGEST_SCALE:
        scale *= 4
        found[scale] = measure(scale)
    scale = 1.0
    while min(found[scale]) < high and scale > 1 / LARGEST_SCALE:
        scale /= 4
        found[scale] = measure(scale)
    for _ in range(2):
        for below, above in pairwise(sorted(found)):
            pairs = list(zip(found[below], found[above], strict=True))
            if any(more >= fraction > less for more, less in pairs for fraction in fractions):
                middle = math.sqrt(below * above)
                found[middle] = measure(middle)
    return sorted(found)


class Study:
    """The sweeps on the same clips; every row is kept as soon as it is finished.

    Args:
        store: where rows and the uncached clips are kept.
        make: makes a row's clips, `generate.Generated`.
        steps: sampling steps.
        config: options of Ada, without MoReg.
        moreg_divisor: d of the published MoReg.
    """

    def __init__(
        self,
        store: Any,
        make: Callable[[Any], Any],
        *,
        steps: int,
        config: Any,
        moreg_divisor: float,
    ) -> None:
        from benchmark.moreg_report import MOREG, PLAIN, RELATIVE_MOREG, halves, motions
        from benchmark.plan import uncached_row

        self.store, self.make, self.steps = store, make, steps
        self.variants = {
            PLAIN: config,
            MOREG: replace(config, moreg=True, moreg_divisor=moreg_divisor),
            RELATIVE_MOREG: replace(config, moreg="relative"),
        }
        self.reference = kept_pictures(store, uncached_row(steps), make)
        self.motion = motions(self.reference)
        self.groups = halves(self.motion)

    def row(self, name: str, scale: float) -> dict[str, Any]:
        """Per-clip compute fractions and PSNR of a variant at a scale of its codebook."""
        from benchmark.plan import cached_row
        from benchmark.video_metrics import clip_psnr_db

        config = replace(self.variants[name], rel_l1_thresh=scale)
        row = cached_row(name, self.steps, config)
        kept = self.store.row(row.key)
        if kept is None:
            made = self.make(row)
            psnr = clip_psnr_db(made.pictures, self.reference)
            kept = {
                "rel_l1_thresh": scale,
                "compute_fraction": [round(s.compute_fraction, 6) for s in made.summaries],
                "psnr_db": [round(value, 4) for value in psnr],
                "config": config.to_dict(),
            }
            self.store.save_row(row.key, kept)
        return kept

    def sweep(self, name: str) -> list[dict[str, Any]]:
        """Rows of a variant around the compute fractions of interest, scales rising."""
        from benchmark.moreg_report import FRACTIONS

        def measure(scale: float) -> list[float]:
            fractions = self.row(name, scale)["compute_fraction"]
            return [fmean(fractions[clip] for clip in clips) for clips in self.groups.values()]

        return [self.row(name, scale) for scale in sweep_scales(measure, FRACTIONS)]

    def results(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips, sweeps and comparisons; ``entries`` are the clips' prompts and seeds."""
        from benchmark.moreg_report import comparisons

        sweeps = {name: self.sweep(name) for name in self.variants}
        fast = set(self.groups["fast"])
        clips = [
            {**entry, "motion": round(motion, 6), "half": "fast" if clip in fast else "slow"}
            for clip, (entry, motion) in enumerate(zip(entries, self.motion, strict=True))
        ]
        return {"clips": clips, **comparisons(sweeps, self.groups), "sweeps": sweeps}


def run(argv: Sequence[str], console: Console) -> None:
    """Sweep all variants, then write ``results.json`` and ``report.md``."""
    given = make_parser().parse_args(argv)
    if not 0 < given.moreg_divisor < math.inf:
        raise BenchmarkError(f"--moreg_divisor: must be above 0, got {given.moreg_divisor:g}")
    settings = study_settings(given, PASSED_ON, OUTPUT, "--model_type=opensora")
    if settings.num_prompts is not None and settings.num_prompts < 2:
        raise BenchmarkError("--num_prompts: two halves need at least 2")

    from benchmark.loading import load_documented
    from benchmark.moreg_report import render, tables
    from benchmark.plan import method_config

    config = method_config("Ada", load_documented(settings), {"codebook": "fast"})
    divisor = {"moreg_divisor": given.moreg_divisor}
    with opened(settings, console, divisor, unit="clip") as session:

        def make(row: Any) -> Any:
            scale = "" if row.config is None else f" {row.config.rel_l1_thresh:g}"
            return session.make(row, said=row.name + scale)

        steps = settings.num_inference_steps[0]
        study = Study(session.bench.store, make, steps=steps, config=config, **divisor)
        found = {**divisor, **study.results(session.bench.entries)}
    session.write(found, render, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
