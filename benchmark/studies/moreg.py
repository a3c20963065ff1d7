"""What AdaCache's Motion Regularization gains at equal compute on Open-Sora's fast clips.

Ada without and with MoReg is swept over the scale of its codebook.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmark.errors import BenchmarkError
from benchmark.models.loading import load_documented
from benchmark.models.names import changed
from benchmark.run.rows import cached_row, method_config, uncached_row
from benchmark.score.clips import clip_psnr_db
from benchmark.settings import Settings
from benchmark.studies.catalogue import MoregOptions
from benchmark.studies.moreg_report import (
    EQUAL_AT,
    MOREG,
    PLAIN,
    comparisons,
    halves,
    motions,
    render,
    tables,
)
from benchmark.studies.session import kept_pictures, opened

LARGEST_SCALE = 2.0**14
"""The sweep goes no further than from its reciprocal to this."""


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


class ScaleSweeps:
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
        self.store, self.make, self.steps = store, make, steps
        self.variants = {
            PLAIN: config,
            MOREG: changed(config, moreg=True, moreg_divisor=moreg_divisor),
        }
        self.reference = kept_pictures(store, uncached_row(steps), make)
        self.motion = motions(self.reference)
        self.groups = halves(self.motion)

    def row(self, name: str, scale: float) -> dict[str, Any]:
        """Per-clip compute fractions and PSNR of a variant at a scale of its codebook."""
        config = changed(self.variants[name], rel_l1_thresh=scale)
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

        def measure(scale: float) -> list[float]:
            fractions = self.row(name, scale)["compute_fraction"]
            return [fmean(fractions[clip] for clip in clips) for clips in self.groups.values()]

        return [self.row(name, scale) for scale in sweep_scales(measure, EQUAL_AT)]

    def results(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips, sweeps and comparisons; ``entries`` are the clips' prompts and seeds."""
        sweeps = {name: self.sweep(name) for name in self.variants}
        fast = set(self.groups["fast"])
        clips = [
            {**entry, "motion": round(motion, 6), "half": "fast" if clip in fast else "slow"}
            for clip, (entry, motion) in enumerate(zip(entries, self.motion, strict=True))
        ]
        return {"clips": clips, **comparisons(sweeps, self.groups), "sweeps": sweeps}


def run(settings: Settings, options: MoregOptions, console: Console) -> None:
    """Sweep both variants, then write ``results.json`` and ``report.md``."""
    if settings.num_prompts is not None and settings.num_prompts < 2:
        raise BenchmarkError("--num_prompts: two halves need at least 2")
    config = method_config("Ada", load_documented(settings), {"codebook": "fast"})
    divisor = {"moreg_divisor": options.moreg_divisor}
    with opened(settings, console, divisor, unit="clip") as session:

        def make(row: Any) -> Any:
            scale = f" {row.config.to_dict()['rel_l1_thresh']:g}" if row.config else ""
            return session.make(row, said=row.name + scale)

        steps = settings.num_inference_steps[0]
        sweeps = ScaleSweeps(session.bench.store, make, steps=steps, config=config, **divisor)
        found = {**divisor, **sweeps.results(session.bench.entries)}
    session.write(found, render, tables)
