"""Calibrate targets for a model on development prompts, and store them beside the model."""

import argparse
import math
from typing import Any

import torch
from calibration_runs import load, parse_arguments, settings_of
from tqdm.auto import tqdm
from xfuser_adacorr.model_executor.cache.target_calibration import (
    TARGETS_FILE,
    save_target_calibration,
)
from xfuser_adacorr.model_executor.cache.target_fitting import TargetRecorder

from benchmark.generate import make_picture
from benchmark.metrics import psnr_db
from benchmark.settings import Settings
from benchmark.sweeps import SWEEPS
from benchmark.video_metrics import clip_psnr_db
from xfuser_adacorr import cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.engine import engine_of


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, nargs="+", help="step counts (the two that the family is swept at)")
    add("--tolerances", type=float, nargs="+", help="of Auto (those of its sweep at the steps)")


def sweep_tolerances(model_type: str, steps: int) -> list[float]:
    """Auto's in the family's sweep, at the number of steps nearest to this one."""
    sweeps = SWEEPS[model_type]
    listed = sweeps[min(sweeps, key=lambda known: abs(known - steps))]
    return [knob["adacorr_tolerance"] for knob in listed["Auto"]]


def fidelity_db(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR of a picture, or of a clip as the mean over its frames; infinite if identical."""
    if torch.equal(picture, reference):
        return math.inf
    psnr = psnr_db if picture.ndim == 3 else clip_psnr_db
    return psnr(picture[None], reference[None])[0]


def record(
    pipe: Any,
    settings: Settings,
    entry: dict[str, Any],
    steps: int,
    tolerances: list[float],
    recorder: TargetRecorder,
) -> None:
    """Add a prompt's run at every tolerance."""
    reference = make_picture(pipe, settings, entry, steps)
    for tolerance in tolerances:
        enable_cache(pipe, "Auto", adacorr_tolerance=tolerance)
        try:
            picture = make_picture(pipe, settings, entry, steps)
            schedule = engine_of(pipe.transformer).clock.schedule
            trace = cache_summary(pipe).trace
        finally:
            disable_cache(pipe)
        recorder.add(trace, schedule, fidelity_db(picture, reference))


def main() -> None:
    arguments = parse_arguments(__doc__, TARGETS_FILE, add_options)
    settings, recorder = arguments.settings, TargetRecorder()
    pipe, entries = load(settings)
    counts = arguments.steps or sorted(SWEEPS[settings.model_type])
    tolerances = {
        steps: arguments.tolerances or sweep_tolerances(settings.model_type, steps)
        for steps in counts
    }
    for steps in counts:
        for entry in tqdm(entries, desc=f"{steps} steps", unit="prompt"):
            record(pipe, settings, entry, steps, tolerances[steps], recorder)
    calibration = recorder.fit()
    relation = calibration.relation
    spread = recorder.spread_db(relation)
    content = settings_of(settings, pipe, steps=counts, tolerances=tolerances, spread_db=spread)
    save_target_calibration(arguments.output, calibration, pipe.transformer, content)
    for place, rate in calibration.profile.points:
        print(f"at {place:.3f}: rate {rate:.3f}")
    print(f"PSNR = {relation.at_one:.2f} - {relation.slope:.2f} log10(E), +- {spread:.1f} dB")
    print(f"{len(recorder.pictures)} pictures used; wrote {arguments.output}")


if __name__ == "__main__":
    main()
