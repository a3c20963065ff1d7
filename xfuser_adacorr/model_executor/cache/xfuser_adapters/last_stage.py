"""Repair of a multistep sampler under PipeFusion: the last stage steps it, with guided outputs."""

import inspect
from collections.abc import Callable
from typing import Any

from xfuser_adacorr.model_executor.cache.adacorrection import Resample
from xfuser_adacorr.model_executor.cache.forecasts import LastValue, as_velocity
from xfuser_adacorr.model_executor.cache.intercept import intercept_step, release
from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.schedulers import unwrapped
from xfuser_adacorr.model_executor.cache.step import Step


class LastStageSteps:
    """Takes over ``stepper.step`` for a run, while the latents are whole.

    Patches share one sampler, whose state cannot be set back for one of them alone: steps that no
    `called` announced are left as they are.
    """

    def __init__(self, stepper: Any) -> None:
        name = type(unwrapped(stepper)).__name__

        def warn(circumstance: str) -> None:
            warn_once(f"{name}{circumstance}: AdaCorrection extrapolates without repair")

        self._stepper, self._repair = stepper, Resample(stepper, warn)
        self._guided = LastValue()
        """What the sampler was given at the last computed step."""
        self._call: tuple[Step, bool] | None = None
        """Step and outcome of the calls since the last step."""
        intercept_step(stepper, self._step)

    def called(self, step: Step, computed: bool) -> None:
        """The model answered a call about the whole latents."""
        before = self._call is None or self._call[1]
        self._call = step, computed and before

    def release(self) -> None:
        release(self._stepper)

    def tensors(self) -> list[Any]:
        return [*self._repair.tensors(), *([] if self._guided.v0 is None else [self._guided.v0])]

    def _step(self, stepper: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return original(*args, **kwargs)
        signature = inspect.signature(original)
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        step, computed = call
        if not computed:
            return self._repair.skip(original, arguments, step)
        fresh = as_velocity(arguments["model_output"], arguments["sample"], step)
        result = self._repair.refresh(original, arguments, step, fresh, self._guided)
        self._guided.update(step, fresh)
        return result
