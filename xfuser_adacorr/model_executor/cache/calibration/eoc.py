"""EOC's prior: mean module outputs of full runs, and how far to follow what they change."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.methods.eoc import (
    FORMS,
    PRIOR_FILE,
    fitted_theta,
    trend,
)
from xfuser_adacorr.model_executor.cache.methods.options import check_count, check_number
from xfuser_adacorr.model_executor.cache.refreshes import refreshed_steps

from .files import output_path
from .module_file import save_table
from .module_runs import Recorded, record_runs, watched
from .runs import Prompts, full_runs


def token_means(out: Tensor, parts: int) -> Tensor:
    """``[rows, ..., D]`` -> ``[parts, D]``: rows of one part (branch of guidance) follow each
    other."""
    return out.float().reshape(parts, -1, out.shape[-1]).mean(1)


def sources(steps: int, interval: int) -> list[int]:
    """For every step the one whose outputs `FORA` has then."""
    computed = set(refreshed_steps(interval, steps)) | {0}
    return [max(s for s in computed if s <= step) for step in range(steps)]


def fit_eoc(
    pipe: Any,
    prompts: Prompts,
    *,
    num_inference_steps: int,
    output: str | Path | None = None,
    intervals: Sequence[int] = (2, 3),
    threshold: float = 0.01,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Path:
    """Average module outputs over half of the ``prompts``, fit theta on them, judge it on the rest.

    Each prompt is a call of its own, so that the rows of a call are guidance's branches. A module
    is corrected in a step where its mean output changed by more than ``threshold``, relatively, and
    where theta lowers the error on the prompts held out. Returns the path of the file beside the
    model; raises `ValueError` or `TypeError` that names the argument, and for modules that return
    more than one tensor.
    """
    check_number("threshold", threshold, least=0)
    for interval in intervals:
        check_count("intervals", interval, least=1)
    runs = full_runs(pipe, prompts, num_inference_steps=num_inference_steps, seed=seed, **call)
    if len(runs.calls) < 2:
        raise ValueError(f"prompts must be at least 2, to hold some out; got {len(runs.calls)}")
    path = output_path(runs.model, PRIOR_FILE, output)
    sums: dict[tuple[int, int, int], Tensor] = defaultdict(float)
    half = (len(runs.calls) + 1) // 2
    seen = {"calls": 0, "last": -1}

    def prompt_of(made: Recorded) -> int:
        seen["calls"] += made.step == 0 and made.branch == 0
        return seen["calls"] - 1

    def average(made: Recorded) -> None:
        for m, out in enumerate(made.outputs):
            if not isinstance(out, Tensor):
                raise ValueError(f"EOC: {modules.places[m].name} returns more than one tensor")
        if prompt_of(made) < half:
            parts = min(len(out) for out in made.outputs)
            for m, out in enumerate(made.outputs):
                sums[made.step, made.branch, m] += token_means(out, parts) / half

    with watched(runs.model) as modules:
        places = record_runs(runs, modules, average, progress)
        count, steps = len(modules.places), len(places.steps)
        branches = 1 + max(branch for _, branch, _ in sums)
        mean = [
            torch.stack(
                [torch.stack([sums[t, b, m] for b in range(branches)]) for t in range(steps)]
            )
            for m in range(count)
        ]
        found = _theta(runs, modules, mean, intervals, half, prompt_of, seen, progress)
        names = [place.name for place in modules.places]
    tensors = {f"mean.{m}": mean[m].half() for m in range(count)}
    for interval in intervals:
        source = sources(steps, interval)
        for form in FORMS:
            fit, judged = (found[interval, form, part] for part in ("fit", "judge"))
            theta = fitted_theta(fit[..., 0], fit[..., 1])
            # sum (d - theta b)^2 - sum d^2
            gain = theta.square() * judged[..., 1] - 2.0 * theta * judged[..., 0]
            moved = torch.stack(
                [
                    torch.stack([(x[t] - x[source[t]]).norm() / x[t].norm() for x in mean])
                    for t in range(steps)
                ]
            )
            theta[(gain >= 0.0) | (moved <= threshold)] = 0.0
            tensors[f"theta.{interval}.{form}"] = theta.float()
    settings = {**runs.settings, "intervals": list(intervals), "threshold": threshold}
    return save_table(path, "EOC", runs.model, names, places, tensors, settings)


def _theta(runs, modules, mean, intervals, half, prompt_of, seen, progress) -> dict:
    """``<d, b>`` and ``<b, b>`` ``[T, M, 2]`` of every interval and form, on both halves."""
    seen["calls"] = 0
    steps, count = len(mean[0]), len(mean)
    zeros = lambda: torch.zeros(steps, count, 2, dtype=torch.float64)  # noqa: E731
    found: dict[tuple[int, str, str], Tensor] = defaultdict(zeros)
    source = {interval: sources(steps, interval) for interval in intervals}
    cached: dict[tuple[int, int], list[Tensor]] = {}

    def measure(made: Recorded) -> None:
        part = "fit" if prompt_of(made) < half else "judge"
        for interval in intervals:
            then = source[interval][made.step]
            if then == made.step:
                cached[interval, made.branch] = made.outputs
                continue
            for m, fresh in enumerate(made.outputs):
                old = cached[interval, made.branch][m].float()
                for form in FORMS:
                    prior = mean[m][:, made.branch]
                    basis = trend(form, old, prior[then], prior[made.step])
                    moved = fresh.float() - old
                    row = torch.stack([(moved * basis).sum(), basis.square().sum()])
                    found[interval, form, part][made.step, m] += row.double()

    record_runs(runs, modules, measure, progress)
    for interval in intervals:
        for form in FORMS:
            for part in ("fit", "judge"):
                found[interval, form, part]  # interval 1 has none
    return found
