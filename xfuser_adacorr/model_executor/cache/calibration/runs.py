"""Full runs of a pipeline on prompts, which calibrations are fitted on."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from xfuser_adacorr.model_executor.cache.api import WITH_BLOCKS, check_uncached, denoisers_of
from xfuser_adacorr.model_executor.cache.methods.options import check_count

Prompts = Sequence[str | Mapping[str, Any]]
"""Texts, or the arguments of one call each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullRuns:
    """A pipeline, which of its models is calibrated, and the calls to make."""

    pipe: Any
    denoiser: str
    """Name of the component."""
    calls: list[dict[str, Any]]
    """Arguments of each call, but for the generator."""
    seeds: list[int]
    settings: dict[str, Any]
    """What a file says of the runs that it was made from."""

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipe, self.denoiser)

    def sample(self, progress: bool) -> None:
        """Run every call, each with the noise of its seed."""
        pairs = list(zip(self.calls, self.seeds, strict=True))
        for call, seed in tqdm(pairs, desc="full runs", unit="prompt", disable=not progress):
            self.pipe(generator=torch.Generator().manual_seed(seed), **call)


def full_runs(
    pipe: Any,
    prompts: Prompts,
    *,
    num_inference_steps: int,
    seed: int = 0,
    denoiser: str | None = None,
    **call: Any,
) -> FullRuns:
    """Check what a calibration was asked for, before anything runs.

    ``seed`` is the first prompt's, ``denoiser`` the name of the component to calibrate (None: the
    transformer), ``call`` are further arguments of the pipeline.

    Raises `TypeError` or `ValueError` that names the argument; `ValueError` too if a cache is
    enabled on the pipeline.
    """
    check_count("num_inference_steps", num_inference_steps, least=1)
    check_count("seed", seed, least=0)
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise TypeError(f"pipe must be a pipeline, which samples the prompts, got {_name(pipe)}")
    models = denoisers_of(pipe, None if denoiser is None else (denoiser,))
    chosen = next((name for name in WITH_BLOCKS if name in models), next(iter(models)))
    check_uncached(pipe)
    shared = {"num_inference_steps": num_inference_steps, **call}
    rows = [_row(prompt) for prompt in _checked(prompts)]
    seeds = [row.pop("seed", seed + index) for index, row in enumerate(rows)]
    calls = [{**shared, **row} for row in rows]
    _check_arguments(pipe, {name for each in calls for name in each})
    settings = {"num_prompts": len(calls), "seed": seed, **_in_common(calls)}
    return FullRuns(pipe=pipe, denoiser=chosen, calls=calls, seeds=seeds, settings=settings)


def _name(x: Any) -> str:
    return type(x).__name__


def _checked(prompts: Prompts) -> Prompts:
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a list of texts, or of mappings with the arguments of one call each, "
            f"got {_name(prompts)}"
        )
    if not prompts:
        raise ValueError("prompts must not be empty")
    return prompts


def _row(prompt: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return dict(prompt)
    raise TypeError(f"prompts must hold texts or mappings, got {prompt!r}")


def _in_common(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of all calls that are equal numbers or words, for the file."""
    plain = {k: v for k, v in calls[0].items() if isinstance(v, (bool, int, float, str))}
    return {k: v for k, v in plain.items() if all(k in each and each[k] == v for each in calls)}


def _check_arguments(pipe: Any, names: set[str]) -> None:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    unknown = sorted(names - set(parameters))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: neither an option of this calibration nor an argument of "
            f"{_name(pipe)}"
        )
