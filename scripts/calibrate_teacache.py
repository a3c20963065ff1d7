"""Fit TeaCache's polynomial for a model and store it beside the model."""

from calibration_runs import parse_arguments, run_pipeline, settings_of
from xfuser_adacorr.model_executor.cache.fitting import TeaRecorder

from xfuser_adacorr.model_executor.cache.calibration import TEA_FILE, save_tea_polynomial


def main() -> None:
    arguments = parse_arguments(__doc__, TEA_FILE)
    recorder = TeaRecorder()
    pipe = run_pipeline(arguments, recorder)
    steps = arguments.num_inference_steps
    settings = settings_of(arguments.settings, pipe, num_inference_steps=steps)
    save_tea_polynomial(arguments.output, recorder.fit(), pipe.transformer, settings)
    print(f"{len(recorder.changes)} changes fitted; wrote {arguments.output}")


if __name__ == "__main__":
    main()
