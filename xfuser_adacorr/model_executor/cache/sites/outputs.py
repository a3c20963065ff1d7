"""The sample in what a model returned, and the same output with another sample."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
