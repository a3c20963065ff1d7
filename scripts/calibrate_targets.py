"""Calibrate targets for a model on development prompts, and store them beside the model."""

import argparse
import math

import torch
from calibration_runs import development_entries, load_pipeline, parse_arguments, sample
from tqdm.auto import tqdm

from xfuser_adacorr import cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.engine import engine_of
from xfuser_adacorr.model_executor.cache.target_calibration import (
    TARGETS_FILE,
    save_target_calibration,
)
from xfuser_adacorr.model_executor.cache.target_fitting import TargetRecorder

TOLERANCES = (0.001, 0.004, 0.012, 0.03)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50], help="step counts")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)


def psnr_db(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Of pictures in [0, 1]; infinite where they are identical."""
    error = float((picture.double() - reference.double()).square().mean())
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def main() -> None:
    arguments = parse_arguments(__doc__, TARGETS_FILE, add_options)
    pipe, recorder = load_pipeline(arguments), TargetRecorder()
    entries = development_entries(arguments)
    for steps in arguments.steps:
        arguments.num_inference_steps = steps
        for entry in tqdm(entries, desc=f"{steps} steps", unit="prompt"):
            reference = sample(pipe, arguments, [entry], output_type="pt")
            for tolerance in arguments.tolerances:
                enable_cache(pipe, "Auto", adacorr_tolerance=tolerance)
                picture = sample(pipe, arguments, [entry], output_type="pt")
                schedule = engine_of(pipe.transformer).clock.schedule
                trace = cache_summary(pipe).trace
                disable_cache(pipe)
                recorder.add(trace, schedule, psnr_db(picture, reference))
    calibration = recorder.fit()
    spread = recorder.spread_db(calibration.relation)
    settings = {
        "num_prompts": len(entries),
        "steps": arguments.steps,
        "tolerances": list(arguments.tolerances),
        "height": arguments.height,
        "width": arguments.width,
        "spread_db": spread,
    }
    save_target_calibration(arguments.output, calibration, pipe.transformer, settings)
    for place, rate in calibration.profile.points:
        print(f"at {place:.3f}: rate {rate:.3f}")
    relation = calibration.relation
    print(f"PSNR = {relation.at_one:.2f} - {relation.slope:.2f} log10(E), +- {spread:.1f} dB")
    print(f"{len(recorder.pictures)} pictures used; wrote {arguments.output}")


if __name__ == "__main__":
    main()
