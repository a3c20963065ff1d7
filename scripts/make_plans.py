"""Fit the learned plan of one of the benchmark's pipelines on development prompts, and store it as
``plan.json`` in the pipeline's directory. Interrupted, it goes on where it stopped. With --measure
the plan that is there is measured anew: on development prompts with other noise, or on the test
split (give a copy as --output then: what a plan states is of development prompts)."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.models.families import FAMILIES, BenchmarkFamily, Request
from xfuser_adacorr import calibrate_learned, measure_plan
from xfuser_adacorr.__main__ import FITTED_WITH
from xfuser_adacorr.model_executor.cache.calibration.learned import BUDGETS, SEARCH_EVALUATIONS
from xfuser_adacorr.model_executor.cache.calibration.plan_file import PlanFile

OTHER_NOISE = 10_000
"""Added to the seeds of development prompts for a measurement."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_type", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--model", type=Path, help="benchmark/pipelines/MODEL_TYPE")
    parser.add_argument("--prompts", type=Path, help="benchmark/prompts/MODEL_TYPE.json")
    parser.add_argument("--num_inference_steps", type=int, help="the family's usual number")
    parser.add_argument("--num_prompts", type=int, default=16, help="of the split (16)")
    parser.add_argument("--held_out", type=int, help="of them, not fitted on (a quarter)")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--search_evaluations", type=int, default=SEARCH_EVALUATIONS)
    parser.add_argument(
        "--starts", nargs="*", default=[], help="schedules to begin from: 0,8,10,14,17 0,4,8,..."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts sampled together")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the moves")
    parser.add_argument("--output", type=Path, help="plan.json in the pipeline's directory")
    parser.add_argument("--measure", action="store_true", help="fit nothing, state the PSNR anew")
    parser.add_argument("--split", choices=("development", "test"), default="development")
    arguments = parser.parse_args()
    for name in (*FITTED_WITH, "starts") if arguments.measure else ():
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name} is of a calibration, and --measure fits nothing")
    if arguments.split == "test" and not (arguments.measure and arguments.output):
        parser.error("--split test is for --measure, with a copy of the plan as --output")
    return arguments


def call_of(pipe: Any, family: BenchmarkFamily, text: str) -> dict[str, Any]:
    """Arguments of the pipeline for one prompt, as the benchmark calls it."""
    side = family.picture_size(pipe)
    asked = Request(
        text=text,
        height=side,
        width=side,
        num_frames=family.num_frames,
        guidance_scale=family.guidance_scale,
        true_cfg_scale=1.0,
    )
    return family.call(pipe, asked)


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    family = FAMILIES[arguments.model_type]
    model = arguments.model or Path("benchmark/pipelines") / arguments.model_type
    pipe = family.load_class().from_pretrained(str(model), local_files_only=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    path = arguments.prompts or Path("benchmark/prompts") / f"{arguments.model_type}.json"
    entries = json.loads(path.read_text())[arguments.split][: arguments.num_prompts]
    calls = [call_of(pipe, family, entry[family.text]) for entry in entries]
    own = [name for name in ("prompt", "class_labels") if name in calls[0]]
    fitted_on = arguments.split == "development"
    other_noise = OTHER_NOISE if arguments.measure and fitted_on else 0
    prompts = [
        {**{name: call[name] for name in own}, "seed": entry["seed"] + other_noise}
        for call, entry in zip(calls, entries, strict=True)
    ]
    common = {
        "num_inference_steps": arguments.num_inference_steps or family.steps,
        "batch_size": arguments.batch_size,
        **{name: value for name, value in calls[0].items() if name not in own},
    }
    output = arguments.output or model / "plan.json"
    if arguments.measure:
        path = measure_plan(pipe, prompts, plan=output, **common)
    else:
        path = calibrate_learned(
            pipe,
            prompts,
            budgets=arguments.budgets,
            search_evaluations=arguments.search_evaluations,
            seed=arguments.seed,
            output=output,
            held_out=arguments.held_out,
            starts=[tuple(int(step) for step in text.split(",")) for text in arguments.starts],
            **common,
        )
    plan = PlanFile.load(path).plans[-1]
    for course in plan.courses:
        psnr = f"{course.psnr_db:.1f} dB on {course.measured_on} pictures"
        if course.rule_psnr_db is not None:
            psnr += f", Auto's own rule {course.rule_psnr_db:.1f} dB"
        print(f"{len(course.steps)} of {plan.num_steps} steps: {psnr}")


if __name__ == "__main__":
    main()
