"""The sample in what a model returned, and the same output with another sample.

Where models, not samplers, are answered, this is what the engine's steps are for samplers.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from xfuser_adacorr.model_executor.cache.engine import Lane
from xfuser_adacorr.model_executor.cache.forecasts import as_velocity
from xfuser_adacorr.model_executor.cache.step import Step


def sample_of(output: Any) -> Tensor:
    """The sample in a tensor, a tuple, a mapping, or a diffusers output.

    xfuser's legacy wrappers have a pair in the place of the sample. Raises `TypeError` for others.
    """
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Mapping) and not hasattr(output, "sample"):
        output = next(iter(output.values()))
    sample = getattr(output, "sample", output)
    if isinstance(sample, tuple):
        sample = sample[0]
    if not isinstance(sample, Tensor):
        raise TypeError(f"the model's output must hold a tensor first, got {type(output).__name__}")
    return sample


def replaced_sample(output: Any, sample: Tensor) -> Any:
    """An output of the same form with ``sample`` in it."""
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, (tuple, list)):
        return type(output)([replaced_sample(output[0], sample), *output[1:]])
    if isinstance(output, Mapping):
        name = "sample" if "sample" in output else next(iter(output))
        copied = copy.copy(output)
        copied[name] = replaced_sample(output[name], sample)
        return copied
    copied = copy.copy(output)
    copied.sample = replaced_sample(output.sample, sample)
    return copied


def reused_output(lane: Lane, step: Step, template: Any) -> Any:
    """The forecast in the form of ``template``, an earlier output; what that owes is remembered."""
    lane.repair.owe(step)
    return replaced_sample(template, lane.forecast(step).to(sample_of(template).dtype))


def refreshed_output(
    lane: Lane, step: Step, latents: Tensor, output: Any, learn: Callable[[list[Tensor]], None]
) -> Any:
    """A computed output with what is owed; ``learn`` is told what the forecast missed."""
    sample = sample_of(output)
    fresh = as_velocity(sample, latents, step)
    learn(lane.forecast.missed(step, fresh))
    paid = lane.repair.pay(step, fresh, lane.forecast)
    lane.forecast.update(step, fresh)
    return output if paid is fresh else replaced_sample(output, paid.to(sample.dtype))
