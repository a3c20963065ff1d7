"""Search the best refreshed steps for a budget on development prompts, and store them beside the
model. Interrupted, it goes on where it stopped."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from calibrate import final_latents, load, make_parser, read_arguments, settings_of
from tqdm.auto import tqdm

from benchmark.models.package import (
    SCHEDULE_FILE,
    Steps,
    StoredSchedule,
    describe_sampler,
    even_starts,
    log_snrs,
    model_fingerprint,
    read_places,
    save_schedule,
    search_schedule,
)
from benchmark.run.tuning import ADACORRECTION, schedule_config
from xfuser_adacorr import disable_cache, enable_cache


def add_options(parser: argparse.ArgumentParser) -> None:
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--compute_fraction", type=float, help="share of the steps computed")
    budget.add_argument("--computed_steps", type=int, help="the same as a number of steps")
    parser.add_argument(
        "--stand_in", choices=("reuse", "forecast", ADACORRECTION), default=ADACORRECTION
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the moves")
    parser.add_argument("--max_evaluations", type=int, help="sets to score at the most (all)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts sampled together")
    parser.add_argument("--checkpoint", type=Path, help="default: beside the output")


def budget_of(arguments: argparse.Namespace) -> int:
    """Computed steps; `SystemExit` naming the argument for what the run does not have."""
    steps = arguments.num_inference_steps
    budget = arguments.computed_steps
    if budget is None:
        budget = math.floor(arguments.compute_fraction * steps + 0.5)
    if not 2 <= budget <= steps:
        raise SystemExit(
            f"--compute_fraction or --computed_steps: {budget} computed steps of {steps}; from 2 "
            f"to {steps} are accepted"
        )
    return budget


class LatentsScore:
    """PSNR in dB of the final latents against the uncached run's, mean over the prompts.

    The peak is the range of a prompt's uncached latents. Where the pipeline gives no latents
    (DiT's), they are pictures.
    """

    def __init__(
        self, pipe: Any, entries: list[dict[str, Any]], arguments: argparse.Namespace
    ) -> None:
        self.pipe, self.arguments, size = pipe, arguments, arguments.batch_size
        self.batches = [entries[i : i + size] for i in range(0, len(entries), size)]
        self.references = [self._sample(batch) for batch in self.batches]

    def _sample(self, batch: list[dict[str, Any]]) -> torch.Tensor:
        steps = self.arguments.num_inference_steps
        return final_latents(self.pipe, self.arguments.settings, batch, steps).double()

    def __call__(self, steps: Steps) -> float:
        enable_cache(self.pipe, schedule_config(self.arguments.stand_in, steps))
        try:
            values = []
            for batch, references in zip(self.batches, self.references, strict=True):
                for latents, reference in zip(self._sample(batch), references, strict=True):
                    error = (latents - reference).square().mean().clamp_min(1e-20)
                    peak = reference.max() - reference.min()
                    values.append(10.0 * float(torch.log10(peak.square() / error)))
        finally:
            disable_cache(self.pipe)
        return sum(values) / len(values)


class Checkpoint:
    """The scores so far, written after every one; those of another search are refused."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.scores: dict[Steps, float] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                raise SystemExit(
                    f"--checkpoint: {path} is of another search ({content['settings']}); remove "
                    "it, or name another file"
                )
            self.scores = {tuple(steps): value for steps, value in content["scores"]}

    def note(self, steps: Steps, value: float) -> None:
        self.scores[steps] = value
        scores = [[list(steps), value] for steps, value in self.scores.items()]
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text(json.dumps({"settings": self.settings, "scores": scores}))
        temporary.replace(self.path)


def main() -> None:
    parser = make_parser(__doc__, SCHEDULE_FILE)
    add_options(parser)
    arguments = read_arguments(parser)
    if arguments.output.is_dir():
        arguments.output = arguments.output / SCHEDULE_FILE
    budget, steps = budget_of(arguments), arguments.num_inference_steps
    pipe, entries = load(arguments.settings)
    settings = {
        **settings_of(arguments.settings, pipe, num_inference_steps=steps),
        "computed_steps": budget,
        "stand_in": arguments.stand_in,
        "seed": arguments.seed,
        "max_evaluations": arguments.max_evaluations,
    }
    path = arguments.checkpoint or arguments.output.with_suffix(".progress.json")
    identity = {**settings, "fingerprint": model_fingerprint(pipe.transformer)}
    checkpoint = Checkpoint(path, {**identity, "sampler": describe_sampler(pipe.scheduler)})
    score = LatentsScore(pipe, entries, arguments)  # and with it the run's noise levels
    levels, logs = read_places(pipe.scheduler).coordinates, log_snrs(pipe.scheduler)
    starts = even_starts(logs, budget)
    bar = tqdm(initial=len(checkpoint.scores), total=arguments.max_evaluations, unit="schedule")

    def scored(refreshed: Steps, value: float) -> None:
        checkpoint.note(refreshed, value)
        bar.update()
        bar.set_postfix(best=f"{max(checkpoint.scores.values()):.2f} dB")

    found = search_schedule(
        score,
        list(starts.values()),
        steps,
        seed=arguments.seed,
        max_evaluations=arguments.max_evaluations,
        known=checkpoint.scores,
        scored=scored,
    )
    bar.close()
    stored = StoredSchedule(
        refreshed=found.steps,
        stand_in=arguments.stand_in,
        sampler=describe_sampler(pipe.scheduler),
        levels=tuple(levels),
        score_db=found.score,
    )
    settings |= {"evaluations": found.evaluations, "complete": found.complete}
    save_schedule(arguments.output, stored, pipe.transformer, settings)
    path.unlink(missing_ok=True)
    for name, start in starts.items():
        if start in checkpoint.scores:  # fewer evaluations than starts leave some out
            print(f"{name}: {checkpoint.scores[start]:.2f} dB with {list(start)}")
    print(f"found: {found.score:.2f} dB with {list(found.steps)}")
    print(f"{found.evaluations} schedules scored; wrote {arguments.output}")


if __name__ == "__main__":
    main()
