"""What methods are tuned on: development prompts alone, never those that a run is scored on.

Every result is kept beside the run's rows, so that a resumed run does not tune again.
"""

import ast
import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_prompts
from benchmark.models.names import CORRECTED, SCHEDULE
from benchmark.models.package import Steps, even_starts, log_snrs, search_schedule
from benchmark.peers import PeerConfig, calibration_of
from benchmark.run.generate import make_picture, prepared
from benchmark.run.rows import Row, cached_row, uncached_row
from benchmark.run.store import read_json, write_json
from benchmark.run.trajectories import Samples
from benchmark.run.workbench import Workbench
from benchmark.score.pictures import psnr_db
from xfuser_adacorr import CacheConfig

ADACORRECTION = "adacorrection"
"""Stands in for the calls that a schedule with AdaCorrection skips."""
MAG_CACHE = "diffusers:MagCache"
CALIBRATION_PROMPTS = 4


def schedule_config(stand_in: str, steps: Steps) -> CacheConfig:
    """The given computed steps under reuse, forecast or adacorrection."""
    if stand_in == ADACORRECTION:
        return CacheConfig.from_name(SCHEDULE + CORRECTED, schedule=steps)
    return CacheConfig.from_name(SCHEDULE, schedule=steps, stand_in=stand_in)


class Tuner:
    """Tunes the rows of a run with its pipeline.

    Args:
        bench: of the run.
        num_prompts: development prompts of a search.
        max_evaluations: schedules that a search scores at the most.
    """

    def __init__(self, bench: Workbench, num_prompts: int = 8, max_evaluations: int = 40) -> None:
        self.bench = bench
        self.num_prompts = num_prompts
        self.max_evaluations = max_evaluations
        self._references: dict[int, tuple[Tensor, list[float]]] = {}

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """Read when a method has to be tuned, and only then."""
        settings = self.bench.settings
        return load_prompts(replace(settings, split="development", num_prompts=self.num_prompts))

    @cached_property
    def samples(self) -> Samples:
        """Runs of the development prompts, for peers that are calibrated."""
        return Samples(self.bench.pipe, self.bench.settings, self.entries, self._path)

    def tuned(self, row: Row) -> Row:
        """The row with what its method has to be told about the run and the model."""
        config = row.config
        if not isinstance(config, PeerConfig):
            return row
        settings = self.bench.settings
        two_calls = FAMILIES[settings.model_type].guided_in_two_calls
        config = replace(config, true_cfg=two_calls or settings.true_cfg_scale > 1)
        if config.name == MAG_CACHE:
            ratios = self._kept(f"magcache-{row.num_inference_steps}", self._mag_ratios, row)
            options = {**dict(config.options), "mag_ratios": tuple(ratios)}
            config = replace(config, options=tuple(sorted(options.items())))
        calibration = calibration_of(config)
        if calibration is not None:
            name, make = calibration
            name = f"{name}-{row.num_inference_steps}"
            self._kept(name, make, self.samples, row.num_inference_steps)
            config = replace(config, calibration=str(self._path(name)))
        return replace(row, config=config)

    def _path(self, name: str) -> Path:
        return self.bench.store.directory / "tuning" / f"{name}.json"

    def _kept(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        path = self._path(name)
        if not path.is_file():
            write_json(path, make(*arguments))
        return read_json(path)

    def _mag_ratios(self, row: Row) -> list[float]:
        """MagCache's own calibration run, mean over prompts and branches."""
        steps = row.num_inference_steps
        options = tuple(item for item in row.config.options if item[0] != "mag_ratios")
        row = replace(row, config=replace(row.config, options=options))
        printed = io.StringIO()
        with prepared(self.bench.pipe, row), contextlib.redirect_stdout(printed):
            for entry in self.entries[:CALIBRATION_PROMPTS]:
                make_picture(self.bench.pipe, self.bench.settings, entry, steps)
        lines = printed.getvalue().splitlines()
        found = [ast.literal_eval(line) for line in lines if line.startswith("[1.0,")]
        return [fmean(values) for values in zip(*found, strict=True)]

    def searched_row(
        self,
        name: str,
        stand_in: str,
        steps: int,
        computed: int,
        scored: Callable[[], None] = lambda: None,
    ) -> Row:
        """A schedule of so many computed steps, searched for one stand-in.

        The search begins from `even_starts` and maximises the PSNR of the development pictures
        against their uncached ones.
        """
        own = self.bench.family.solvers[0]
        path = self._path(f"schedule-{stand_in}-{computed}-of-{steps}")
        content = read_json(path) if path.is_file() else {"found": None, "scores": []}
        if content["found"] is None:
            known = {tuple(refreshed): value for refreshed, value in content["scores"]}

            def note(refreshed: Steps, value: float) -> None:
                content["scores"].append([list(refreshed), value])
                write_json(path, content)
                scored()

            def score(refreshed: Steps) -> float:
                row = cached_row(name, steps, schedule_config(stand_in, refreshed), own)
                return self._psnr(row)

            found = search_schedule(
                score,
                list(even_starts(self._uncached(steps)[1], computed).values()),
                steps,
                max_evaluations=self.max_evaluations,
                known=known,
                scored=note,
            )
            content["found"] = list(found.steps)
            write_json(path, content)
        return cached_row(name, steps, schedule_config(stand_in, tuple(content["found"])), own)

    def _psnr(self, row: Row) -> float:
        return fmean(psnr_db(self._pictures(row), self._uncached(row.num_inference_steps)[0]))

    def _uncached(self, steps: int) -> tuple[Tensor, list[float]]:
        """The uncached pictures, and the log-SNR of the steps they took."""
        if steps not in self._references:
            row = uncached_row(steps, self.bench.family.solvers[0])
            pictures = self._pictures(row)
            self._references[steps] = pictures, log_snrs(self.bench.pipe.scheduler)
        return self._references[steps]

    def _pictures(self, row: Row) -> Tensor:
        pipe, settings = self.bench.pipe, self.bench.settings
        with prepared(pipe, row):
            made = [make_picture(pipe, settings, e, row.num_inference_steps) for e in self.entries]
        return torch.stack(made)
