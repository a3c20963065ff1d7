"""One way to run a tiny pipeline of diffusers: how it is built, called, read and counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline
from torch import Tensor


def flat(output: Any) -> Tensor:
    """All numbers of what a pipeline returned, as one float tensor [n]."""
    if isinstance(output, Tensor):
        return output.float().flatten()
    if isinstance(output, numpy.ndarray):
        return torch.from_numpy(output).float().flatten()
    if isinstance(output, dict):  # every output dataclass of diffusers is one, too
        return flat(list(output.values()))
    if isinstance(output, list | tuple):
        return torch.cat([flat(part) for part in output if part is not None])
    raise TypeError(f"output: no tensors in a {type(output).__name__}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline and the arguments of one kind of run."""

    name: str
    """Family first: ``flux-img2img-true-cfg``."""
    build: Callable[[], DiffusionPipeline]
    """Makes a new pipeline; any two have equal weights, bit for bit."""
    arguments: Callable[[bool], dict[str, Any]]
    """(larger) -> arguments of the pipeline, but for steps, generator and output type.

    ``larger`` asks for other shapes: height and width, frames, or batch.
    """
    result: Callable[[Any], Tensor] = flat
    """What the pipeline returned -> one float tensor."""
    denoisers: tuple[str, ...] = ("transformer",)
    """Names of the components that the sampling loop calls."""
    calls_a_step: int | None = 1
    """Calls of all denoisers together for one output of the guidance; None where it varies."""
    steps: int = 7
    """Sampling steps in a test."""
    strength: float = 1.0
    """Share of the steps asked for that is sampled (image-to-image)."""
    order: int = 1
    """Evaluations a step; the last step of a solver of order 2 has one alone."""
    extra_evaluations: int = 0
    """Beyond ``order``: the second one of PNDM at its second noise level."""
    steps_argument: str = "num_inference_steps"
    output_type: str | None = "latent"
    """None where the pipeline takes no ``output_type``."""
    irregular: bool = False
    """Several loops in a run, or steps with other calls than those before: which calls are computed
    is not told by the number of steps alone."""
    stochastic: bool = False
    """Whether the sampler draws noise in its step."""


def run(
    case: Case,
    pipe: DiffusionPipeline,
    *,
    steps: int | None = None,
    seed: int = 0,
    larger: bool = False,
    **overrides: Any,
) -> Tensor:
    """Sample once; ``overrides`` are further arguments of the pipeline."""
    arguments = case.arguments(larger)
    arguments[case.steps_argument] = round((steps or case.steps) / case.strength)
    arguments["generator"] = torch.Generator().manual_seed(seed)
    if case.output_type is not None:
        arguments["output_type"] = case.output_type
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some pipelines encode a control picture without the generator
        return case.result(pipe(**(arguments | overrides)))


def evaluations(case: Case, steps: int | None = None) -> int:
    """Guided outputs that a run of so many steps needs."""
    steps = steps or case.steps
    return case.order * steps - (case.order - 1) + case.extra_evaluations


@contextmanager
def counted_calls(case: Case, pipe: DiffusionPipeline) -> Iterator[Counter[str]]:
    """Count the computed calls of every denoiser by its name while the context is open."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: counts.update([name])

    handles = [
        getattr(pipe, name).register_forward_pre_hook(count(name)) for name in case.denoisers
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
