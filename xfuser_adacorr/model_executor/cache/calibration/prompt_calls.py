"""Prompts -> the arguments of a pipeline's calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt")


def check_prompts(prompts: Any) -> None:
    """`ValueError` unless there are prompts."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of texts or of arguments, got {prompts!r}")


def batched_calls(
    prompts: Sequence[str | Mapping[str, Any]], batch_size: int, seed: int, call: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Arguments of each call: ``batch_size`` prompts together, and the ``seeds`` of their noise."""
    check_prompts(prompts)
    several = [name for name in SEVERAL if call.get(name) not in (None, 1)]
    if several or "generator" in call:
        raise ValueError(
            f"{(several or ['generator'])[0]}: every prompt is sampled once, from its own seed"
        )
    entries = [{"prompt": each} if isinstance(each, str) else dict(each) for each in prompts]
    seeds = [int(entry.pop("seed", seed + place)) for place, entry in enumerate(entries)]
    calls = []
    for start in range(0, len(entries), batch_size):
        merged = _merged(entries[start : start + batch_size])
        shared = {name: _for_each(name, value, merged) for name, value in call.items()}
        calls.append({**merged, **shared, "seeds": seeds[start : start + batch_size]})
    return calls


def _for_each(name: str, value: Any, merged: Mapping[str, Any]) -> Any:
    """A negative prompt once for each of several prompts, as some pipelines ask for it."""
    prompts = merged.get("prompt")
    if name.startswith("negative_prompt") and isinstance(value, str) and isinstance(prompts, list):
        return [value] * len(prompts)
    return value


def _merged(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of one call for several prompts: texts become lists, lists longer ones, tensors
    longer batches."""
    if len(entries) == 1:
        return dict(entries[0])
    merged = {}
    for key in entries[0]:
        values = [entry.get(key) for entry in entries]
        if all(isinstance(value, Tensor) for value in values):
            merged[key] = torch.cat(values)
        elif all(isinstance(value, list) for value in values):
            merged[key] = [item for value in values for item in value]
        elif all(isinstance(value, str) for value in values):
            merged[key] = values
        elif all(value == values[0] for value in values):
            merged[key] = values[0]
        else:
            raise ValueError(
                f"prompts: {key} differs ({values[0]!r}, ...), which one call cannot have; use "
                "batch_size=1"
            )
    return merged
