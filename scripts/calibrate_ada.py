"""Fit AdaCache's codebook for a model and a compute fraction; store it, and the mean motion of
clips, beside the model."""

import argparse

from calibration_runs import add_steps, parse_arguments, run_pipeline, settings_of
from xfuser_adacorr.model_executor.cache.codebook_fitting import RATES, AdaRecorder, step_shares

from xfuser_adacorr.model_executor.cache.calibration import (
    ADA_FILE,
    AdaCalibration,
    save_ada_calibration,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_steps(parser)
    parser.add_argument(
        "--compute_fraction",
        type=float,
        default=0.5,
        help="share of the calls to be computed, about (the first and last two come on top)",
    )
    parser.add_argument("--rates", type=int, nargs="+", default=RATES, help="steps to the next")


def main() -> None:
    arguments = parse_arguments(__doc__, ADA_FILE, add_options)
    step_shares(arguments.compute_fraction, arguments.rates)  # raises before the runs
    recorder = AdaRecorder()
    pipe = run_pipeline(arguments, recorder)
    codebook = recorder.fit(arguments.compute_fraction, arguments.rates)
    settings = settings_of(
        arguments.settings,
        pipe,
        num_inference_steps=arguments.num_inference_steps,
        compute_fraction=arguments.compute_fraction,
    )
    calibration = AdaCalibration(codebook, recorder.mean_motion())
    save_ada_calibration(arguments.output, calibration, pipe.transformer, settings)
    for threshold, rate in codebook.entries:
        print(f"below {threshold:.4f}: next computed call after {rate}")
    if calibration.motion is not None:
        print(f"mean motion at {len(calibration.motion.points)} places of the run")
    print(f"{len(recorder.changes)} changes used; wrote {arguments.output}")


if __name__ == "__main__":
    main()
