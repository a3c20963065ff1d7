"""The pictures of prompts that no plan was fitted on: what PSNR a course has on them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.adacorrection import NoRepair
from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.forecasts import LastValue
from xfuser_adacorr.model_executor.cache.methods.learned import OnCourse, course_lane
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .pictures import pictures_of, psnr
from .side_by_side import SideBySide


class Unseen:
    """Calls of a pipeline, and their uncached pictures."""

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        calls: Sequence[Mapping[str, Any]],
        finished: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Makes the pictures; ``finished`` is told of every call. `ValueError` for what is not
        finite."""

        def uncached(places: Places, stepper: Any, scope: Any) -> Lane:
            return Lane(OnCourse(range(len(places.steps))), LastValue(), NoRepair())

        self.runs = SideBySide(pipe, models, calls)
        outputs, _ = self.runs.run(uncached, finished=finished)
        self.pictures = [pictures_of(output) for output in outputs]
        for index, pictures in enumerate(self.pictures):
            if not pictures.isfinite().all():
                raise ValueError(f"prompts: an uncached picture of call {index} is not finite")

    def psnr_db(self, steps: Sequence[int], coefficients: Sequence[Sequence[float]]) -> Tensor:
        """Of every picture along a course against the uncached one, in the order of the prompts."""

        def along(places: Places, stepper: Any, scope: Any) -> Lane:
            return course_lane(steps, coefficients, places)

        outputs, _ = self.runs.run(along)
        found = []
        for output, wanted in zip(outputs, self.pictures, strict=True):
            low, high = wanted.min(), wanted.max()
            peak = torch.ones(()) if low >= 0.0 and high <= 1.0 else high - low
            errors = (pictures_of(output) - wanted).square().flatten(1).mean(dim=1)
            found.append(psnr(errors, peak))
        return torch.cat(found)
