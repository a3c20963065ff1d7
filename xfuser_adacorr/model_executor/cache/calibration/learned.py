"""`calibrate_learned`: find and fit the schedules of a pipeline's plan."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from xfuser_adacorr.model_executor.cache.methods.options import check_count, check_number
from xfuser_adacorr.model_executor.cache.refreshes import evenly_spaced

from .files import write_whole, written_whole
from .gap_path import cheapest_schedule
from .learned_fit import RIDGE, ScheduleFit
from .learned_runs import LEAST_SPLIT, ClosedLoop
from .plan_file import (
    PLAN_FILE,
    Course,
    Plan,
    PlanFile,
    course_from,
    fingerprints,
    package_versions,
)
from .prompt_calls import batched_calls, check_prompts
from .search import Steps, near_moves, search_schedule
from .together import together_with
from .unseen import Unseen, measured, numpy_output

logger = logging.getLogger(__name__)

BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
SEARCH_EVALUATIONS = 60
SHORT_SEARCH = 12
"""Schedules that are tried where a pipeline learns from several of its own generations."""
STARTS = 4
"""Schedules that searches begin from: two of the uncached runs, two even ones. Where a pipeline
learns from few generations they are all that is tried: what a search finds may be theirs alone."""
GAP_POWERS = (1.0, 2.0)
"""Of a gap's cost, in the sums of two schedules to begin from."""


def calibrate_learned(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    num_inference_steps: int,
    budgets: Sequence[float] = BUDGETS,
    search_evaluations: int = SEARCH_EVALUATIONS,
    seed: int = 0,
    output: str | Path | None = None,
    held_out: int | None = None,
    starts: Sequence[Sequence[int]] = (),
    batch_size: int = 1,
    denoisers: Sequence[str] | None = None,
    name: str | None = None,
    memory_limit_gib: float = 8.0,
    progress: bool = True,
    replicas: ProcessGroup | None = None,
    **call: Any,
) -> Path:
    """Fit learned correction for a pipeline's runs of ``num_inference_steps``, and store the plan.

    Every prompt is sampled once in full; then for each budget schedules are searched, each fitted
    in closed form along the trajectories that it leads to, which costs its computed steps a prompt.
    While schedules are compared, every third prompt goes along without being fitted on; the best
    one is then fitted on all. Interrupted, the same call goes on after the last budget done.

    Args:
        pipe: a pipeline whose loop calls ``scheduler.step``, without a cache.
        prompts: texts, or arguments of one call each (``{"class_labels": [3]}``), which may have a
            ``"seed"``; eight or more of what the pipeline is used for.
        num_inference_steps: as the pipeline is to be called.
        budgets: shares of the steps to be computed, each in (0, 1).
        search_evaluations: schedules to try for each budget; 1: the best start as it is.
        seed: of the noise (plus the prompt's place) and of the search.
        output: the plan file, or a directory for it; None: ``plan.json`` in the pipeline's
            directory. Plans for other steps that it has stay in it.
        held_out: prompts, from the end of the list, that are not fitted on; the PSNR is stated
            for them. None: a quarter. 0: it is stated for those that were fitted on.
        starts: schedules to begin the searches from, beside those that the uncached runs suggest
            (`gap_path`), even ones, and those of a plan in ``output`` for the same steps.
        batch_size: prompts a call, where the pipeline takes lists.
        denoisers: as in `enable_cache`.
        name: of the plan; None: made from the sampler and its steps.
        memory_limit_gib: beyond it the uncached trajectories are kept in temporary files.
        progress: whether bars are shown.
        replicas: processes that have the whole pipeline each, and divide the prompts; every one
            makes this call, and the first writes. None: xfuser's data-parallel replicas, if it is
            running.
        call: further arguments of the pipeline (``guidance_scale``, ``height``, ...).

    Returns the path of the plan file. Raises `ValueError` for pipelines and samplers that no plan
    can be fitted on (noise drawn in steps, several calls a step), runs that are not finite, and a
    plan file or checkpoint of another model or another calibration; `OSError` for no space.
    """
    from xfuser_adacorr.model_executor.cache.api import check_uncached, denoisers_of

    check_count("num_inference_steps", num_inference_steps, least=2)
    check_count("search_evaluations", search_evaluations, least=1)
    check_count("batch_size", batch_size, least=1)
    check_count("held_out", held_out, least=0, optional=True)
    for budget in budgets:
        check_number("budgets", budget, above=0, most=1)
    check_uncached(pipe)
    models = denoisers_of(pipe, denoisers)
    together = together_with(next(iter(models.values())), replicas)
    path = _output_path(pipe, output)
    check_prompts(prompts)
    held_out = len(prompts) // 4 if held_out is None else held_out
    if held_out >= len(prompts):
        raise ValueError(f"held_out must leave prompts to fit on, got {held_out} of {len(prompts)}")
    call = {"num_inference_steps": num_inference_steps, **numpy_output(pipe, call), **call}
    fitted = len(prompts) - held_out
    if fitted < LEAST_SPLIT and together.is_first:
        logger.warning(
            "prompts: %d to fit on are few, schedules are compared on the very same; give %d or "
            "more besides those held out",
            fitted,
            LEAST_SPLIT,
        )
    calls = batched_calls(prompts[:fitted], batch_size, seed, call)
    others = batched_calls(prompts[fitted:], batch_size, seed + fitted, call) if held_out else []
    together.check_calls(pipe, calls, batch_size)
    before = together.by_first(lambda: _stored_plans(path, models))
    settings = {
        "prompts": len(prompts),
        "held_out": held_out,
        "prompts_digest": _digest([*calls, *others]),
        "seed": seed,
        "search_evaluations": search_evaluations,
        "batch_size": batch_size,
        "ridge": RIDGE,
    }
    loop = ClosedLoop(pipe, models, calls, memory_limit_gib * 2**30, together)
    of_run = {"fingerprints": before.fingerprints, "samplers": loop.runs.samplers()}
    checkpoint = together.by_first(lambda: Checkpoint(path, {**settings, **of_run}))
    progress = progress and together.is_first
    count = sum(len(together.share(each)) for each in (calls, others or calls))
    with tqdm(total=count, desc="uncached", disable=not progress) as bar:
        loop.record(lambda index: bar.update())
        unseen = Unseen(pipe, models, others or calls, lambda index: bar.update(), together)
    steps = len(loop.places.steps)
    counts = sorted({min(max(math.floor(b * steps + 0.5), 1), steps - 1) for b in budgets})
    begin = [*starts, *before.schedules_of(loop.places)]
    for count in counts:
        if count not in checkpoint.courses:
            with tqdm(
                total=search_evaluations, desc=f"{count} of {steps} steps", disable=not progress
            ) as bar:

                def tried(best: float, bar: Any = bar) -> None:
                    bar.update()
                    bar.set_postfix_str(f"{best:.1f} dB")

                course = find_course(loop, count, search_evaluations, seed, begin, tried)
            checkpoint.courses[count] = measured(course, unseen)
            together.by_first(checkpoint.save)
    plan = Plan(
        name=name or f"{loop.places.sampler['class']}-{steps}",
        sampler=loop.places.sampler,
        times=tuple(loop.times),
        guidance_scale=loop.guidance_scale,
        courses=tuple(checkpoint.courses[count] for count in counts),
        settings={**settings, "versions": package_versions()},
    )
    together.by_first(lambda: before.with_plan(plan).save(path))
    together.by_first(checkpoint.remove)
    return path


def find_course(
    loop: ClosedLoop,
    count: int,
    evaluations: int,
    seed: int = 0,
    starts: Sequence[Steps] = (),
    tried: Callable[[float], None] = lambda best: None,
) -> Course:
    """The best schedule of ``count`` steps that a search finds, fitted to all samples.

    ``starts`` are schedules to begin from, beside the usual ones; ``tried`` is told the best score
    after every evaluation.
    """
    best: list[tuple[float, ScheduleFit]] = []

    def score(steps: Steps) -> float:
        fit, final = loop.follow(steps, best[0][1] if best else None)
        value = middle_mean(loop.psnr_db(final))
        if not best or value > best[0][0]:
            best[:] = [(value, fit)]
        tried(best[0][0])
        return value

    found = search_schedule(
        score,
        starting_schedules(loop, count, starts),
        len(loop.places.steps),
        seed=seed,
        max_evaluations=evaluations,
        neighbours=near_moves,
    )
    if loop.fitted is None:  # the best one was fitted on all already
        return _course(best[0][1])
    return _course(loop.follow(found.steps, everything=True)[0])


def starting_schedules(loop: ClosedLoop, count: int, given: Sequence[Steps] = ()) -> list[Steps]:
    """The cheapest over the gaps of the uncached trajectories, those given of so many steps, evenly
    spaced without the last step and with it."""
    steps = range(len(loop.places.steps))
    starts = [cheapest_schedule(loop.gap_costs, count, power) for power in GAP_POWERS]
    starts += [tuple(each) for each in given if len(each) == count]
    if count < len(steps):
        starts.append(evenly_spaced(steps, count + 1)[:-1])
    starts.append(evenly_spaced(steps, count))
    return list(dict.fromkeys(starts))


def middle_mean(values: Tensor) -> float:
    """Mean of the middle half: neither a hard picture nor an easy one decides."""
    ordered, spared = values.sort().values, len(values) // 4
    return float(ordered[spared : len(values) - spared].mean())


def _course(fit: ScheduleFit) -> Course:
    rows = tuple(tuple(row) for row in fit.coefficients)
    return Course(steps=fit.schedule, coefficients=rows, psnr_db=None)


# -- options and files ---------------------------------------------------------------------------


def _output_path(pipe: Any, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output) / PLAN_FILE if Path(output).is_dir() else Path(output)
    directory = getattr(pipe, "name_or_path", None)
    if not directory or not Path(directory).is_dir():
        raise ValueError(
            "output must be given: the pipeline was not loaded from a directory, beside whose "
            f"model {PLAN_FILE} could lie"
        )
    return Path(directory) / PLAN_FILE


def _stored_plans(path: Path, models: Mapping[str, nn.Module]) -> PlanFile:
    """Those in the file, or none."""
    if not path.is_file():
        return PlanFile(fingerprints=fingerprints(models), plans=(), path=str(path))
    stored = PlanFile.load(path)
    stored.check_models(models)
    return stored


def _digest(calls: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(repr(list(calls)).encode()).hexdigest()[:16]


class Checkpoint:
    """The budgets done so far, beside the plan file, until it is written."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.path = output.with_name(output.name + ".checkpoint")
        self.settings = json.loads(json.dumps(dict(settings)))
        self.courses: dict[int, Course] = {}
        if not self.path.is_file():
            self._check_place()
            return
        try:
            content = json.loads(self.path.read_text())
            settings = dict(content["settings"])
            self.courses = {int(count): course_from(c) for count, c in content["courses"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"checkpoint: {self.path} is not one of a calibration ({error}); remove the file"
            ) from error
        if settings != self.settings:
            other = sorted(
                key
                for key in self.settings | settings
                if self.settings.get(key) != settings.get(key)
            )
            raise ValueError(
                f"checkpoint: {self.path} is of another calibration ({', '.join(other)} differ); "
                "finish that one, or remove the file"
            )

    def _check_place(self) -> None:
        """`OSError` where nothing can be written, before the runs."""
        with written_whole(self.path) as partial:
            partial.write_text("")
        self.path.unlink()

    def save(self) -> None:
        courses = {str(count): asdict(each) for count, each in self.courses.items()}
        write_whole(self.path, json.dumps({"settings": self.settings, "courses": courses}))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
