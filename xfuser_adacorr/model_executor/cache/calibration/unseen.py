"""What PSNR a plan's courses have on the pictures of prompts that it was not fitted on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from xfuser_adacorr.model_executor.cache.adacorrection import NoRepair
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.methods.auto import Auto
from xfuser_adacorr.model_executor.cache.methods.learned import (
    OnCourse,
    bind_plans,
    course_lane,
    told_guidance,
)
from xfuser_adacorr.model_executor.cache.methods.options import check_count
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .pictures import pictures_of, psnr
from .plan_file import Course
from .prompt_calls import batched_calls
from .side_by_side import SideBySide
from .together import ALONE, Together, together_with


def measure_plan(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    num_inference_steps: int,
    plan: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 1,
    denoisers: Sequence[str] | None = None,
    progress: bool = True,
    replicas: ProcessGroup | None = None,
    **call: Any,
) -> Path:
    """State the PSNR of a pipeline's plan anew, for prompts that it was not fitted on.

    Every prompt is sampled in full, once along each course of the plan that fits these runs, and
    once by `Auto`'s own rule with as many computed steps; means, spread and number of prompts are
    written into the plan file. ``target_psnr`` and ``expected_psnr_db`` go by them from then on,
    and `Auto` keeps to its own rule where that is better.

    Args:
        pipe: a pipeline without a cache.
        prompts: as in `calibrate_learned`; the more, the better the mean is known.
        num_inference_steps: as the plan was fitted for.
        plan: the plan file; None: ``plan.json`` beside the pipeline or its model.
        seed, batch_size, denoisers, progress, replicas, call: as in `calibrate_learned`.

    Returns the path of the plan file. Raises `FileNotFoundError` where there is none, `ValueError`
    for a plan of another model, no plan for these runs, and pictures that are not finite; `OSError`
    for no space.
    """
    from xfuser_adacorr.model_executor.cache.api import check_uncached, denoisers_of

    check_count("num_inference_steps", num_inference_steps, least=2)
    check_count("batch_size", batch_size, least=1)
    check_uncached(pipe)
    models = denoisers_of(pipe, denoisers)
    together = together_with(next(iter(models.values())), replicas)
    given = None if plan is None else str(plan)
    file = together.by_first(lambda: bind_plans(given, pipe, models).file)
    call = {"num_inference_steps": num_inference_steps, **numpy_output(pipe, call), **call}
    calls = batched_calls(prompts, batch_size, seed, call)
    together.check_calls(pipe, calls, batch_size)
    progress = progress and together.is_first
    with tqdm(total=len(together.share(calls)), desc="uncached", disable=not progress) as bar:
        unseen = Unseen(pipe, models, calls, lambda index: bar.update(), together)
    found = file.plan_for(unseen.places, unseen.guidance_scale)
    courses = [
        measured(course, unseen)
        for course in tqdm(found.courses, desc="along the plan", disable=not progress)
    ]
    stated = file.with_plan(replace(found, courses=tuple(courses)))
    together.by_first(lambda: stated.save(file.path))
    return Path(file.path)


def measured(course: Course, unseen: "Unseen") -> Course:
    """The course with the PSNR of pictures that are made along it, and by `Auto`'s own rule."""
    psnr_db = unseen.psnr_db(course.steps, course.coefficients)
    return replace(
        course,
        psnr_db=float(psnr_db.mean()),
        psnr_spread_db=float(psnr_db.std()) if len(psnr_db) > 1 else None,
        measured_on=len(psnr_db),
        rule_psnr_db=float(unseen.rule_psnr_db(len(course.steps)).mean()),
    )


def numpy_output(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The argument with which pictures come as arrays, where the caller asks for nothing else."""
    takes = "output_type" in signature(type(pipe).__call__).parameters
    return {"output_type": "np"} if takes and "output_type" not in call else {}


class Unseen:
    """Calls of a pipeline, and their uncached pictures."""

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        calls: Sequence[Mapping[str, Any]],
        finished: Callable[[int], None] = lambda index: None,
        together: Together = ALONE,
    ) -> None:
        """Makes the pictures; ``finished`` is told of every call. ``calls`` are those of all ranks,
        of which this one makes its share. `ValueError` for what is not finite."""

        def uncached(places: Places, stepper: Any, scope: Any) -> Lane:
            self.places, self.guidance_scale = places, told_guidance(self.runs.pipes[0])
            return Lane(OnCourse(range(len(places.steps))), LastValue(), NoRepair())

        self.together, self._first = together, together.first_of(calls)
        self.runs = SideBySide(pipe, models, together.share(calls))
        self.places: Places | None = None
        """Of the last run, and the guidance scale that its pipeline told."""
        self.guidance_scale: float | None = None
        self.pictures = self._made(uncached, "prompts: an uncached picture of call {}", finished)

    def psnr_db(self, steps: Sequence[int], coefficients: Sequence[Sequence[float]]) -> Tensor:
        """Of every picture along a course against the uncached one, in the order of the prompts."""

        def along(places: Places, stepper: Any, scope: Any) -> Lane:
            return course_lane(steps, coefficients, places)

        return self._psnr_db(along, f"plan: a picture of call {{}} along {len(steps)} steps")

    def rule_psnr_db(self, computed: int) -> Tensor:
        """Of every picture by `Auto`'s own rule with so many computed steps."""

        def by_rule(places: Places, stepper: Any, scope: Any) -> Lane:
            rule = Auto(target_compute=computed / len(places.steps), use_plan=False)
            return rule.make_lane(places, 0, {}, stepper, scope)

        return self._psnr_db(by_rule, "plan: a picture of call {} by Auto's own rule")

    def _psnr_db(self, directed: Callable, what: str) -> Tensor:
        found = []
        for pictures, wanted in zip(self._made(directed, what), self.pictures, strict=True):
            if wanted is None:
                found.append(None)
                continue
            low, high = wanted.min(), wanted.max()
            peak = torch.ones(()) if low >= 0.0 and high <= 1.0 else high - low
            errors = (pictures - wanted).square().flatten(1).mean(dim=1)
            found.append(psnr(errors, peak))
        return torch.cat(self.together.of_calls(found))

    def _made(
        self,
        directed: Callable,
        what: str,
        finished: Callable[[int], None] = lambda index: None,
    ) -> list[Tensor | None]:
        """The pictures of every call of this rank; None where another rank returns them."""
        outputs, _ = self.runs.run(directed, finished=finished)
        found = [None if output is None else pictures_of(output) for output in outputs]
        with self.together.alike():
            for index, pictures in enumerate(found):
                if pictures is not None and not pictures.isfinite().all():
                    raise ValueError(f"{what.format(self._first + index)} is not finite")
        if None in self.together.of_calls([None if x is None else True for x in found]):
            raise ValueError("calibration: no rank has returned the pictures")
        return found
