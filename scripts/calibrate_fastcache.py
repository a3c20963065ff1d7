"""Fit FastCache's linear maps for a model and store them beside the model."""

from calibration_runs import parse_arguments, run_pipeline, settings_of
from xfuser_adacorr.model_executor.cache.fitting import FastRecorder

from xfuser_adacorr.model_executor.cache.calibration import FAST_FILE, save_fast_maps


def main() -> None:
    arguments = parse_arguments(__doc__, FAST_FILE)
    recorder = FastRecorder()
    pipe = run_pipeline(arguments, recorder)
    steps = arguments.num_inference_steps
    settings = settings_of(arguments.settings, pipe, num_inference_steps=steps)
    save_fast_maps(arguments.output, recorder.maps(), pipe.transformer, settings)
    print(f"{len(recorder.fits)} maps fitted; wrote {arguments.output}")


if __name__ == "__main__":
    main()
