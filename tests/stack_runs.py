"""Runs of tiny models under the stack methods, and what is wrong with them, if anything."""

from functools import cache
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.tiny_models import MODELS
from xfuser_adacorr import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import register_family
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import infer_family
from xfuser_adacorr.model_executor.cache.sites.blocks import block_stack

METHODS = ("Fb", "Tea", "Ada", "Fast")
APART = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Noise levels of a run."""
TOGETHER = tuple(1.0 - 1e-5 * i for i in range(5))
"""Levels so near that what was computed at one of them stands for the others."""
REUSED = 2
"""Index of a call that no method is forced to compute; runs stop after it."""
NEAR = 2e-2
"""Relative difference that a reuse may make at `TOGETHER`; some models enlarge theirs a lot."""


def tensors_in(output: Any) -> list[Tensor]:
    """All samples that a transformer returned: a clip, and its sound if there is some."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if part is not None for tensor in tensors_in(part)]


class Run:
    """Calls of a model at several noise levels, with the blocks counted that each executed.

    A scheduler is stepped after each call, on latents of its own: it says where a call stands.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        levels: tuple[float, ...],
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        self.counts: list[int] = []
        self.outputs: list[list[Tensor]] = []
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(len(levels))
        x = torch.ones(1, 4)
        handles = [block.register_forward_hook(self._count) for block in blocks_of(model)]
        try:
            with torch.no_grad():
                for level, t in zip(levels[: REUSED + 1], scheduler.timesteps, strict=False):
                    self.counts.append(0)
                    self.outputs.append(tensors_in(model(**MODELS[name].inputs(level))))
                    x = scheduler.step(x, t, x, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, *_: object) -> None:
        self.counts[-1] += 1


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for block, _ in block_stack(model, infer_family(model))]


@cache
def made(name: str) -> nn.Module:
    """One model for all runs: each of them has to leave it as it was."""
    return MODELS[name].make()


@cache
def plain(name: str, levels: tuple[float, ...]) -> Run:
    return Run(name, made(name), levels)


def equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative difference of the parts of two outputs."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def problem(name: str, method: str) -> str | None:
    """What is wrong with a stack method on an inferred family; None if nothing is.

    The family is inferred, and registered, also for a class that is described by hand. Raises what
    the cache raises.
    """
    model = made(name)
    expected, near = plain(name, APART).outputs, plain(name, TOGETHER).outputs
    register_family(infer_family(model))
    count = len(blocks_of(model))
    scheduler = FlowMatchEulerDiscreteScheduler()

    enable_cache(model, method, rel_l1_thresh=0.0, scheduler=scheduler)
    try:
        never = Run(name, model, APART, scheduler)
    finally:
        disable_cache(model)
    if never.counts != [count] * (REUSED + 1):
        return f"executes {never.counts} of {count} blocks where it may not reuse"
    if not equal(never.outputs, expected):
        return "is not bit-equal to the plain model where it may not reuse"

    enable_cache(model, method, rel_l1_thresh=1e6, scheduler=scheduler)
    try:
        often = Run(name, model, TOGETHER, scheduler)
    finally:
        disable_cache(model)
    if often.counts[0] != count or often.counts[REUSED] > (method == "Fb"):
        return f"executes {often.counts} of {count} blocks where it reuses what it can"
    reused, computed = often.outputs[REUSED], near[REUSED]
    if equal([reused], [computed]):
        return "reuses nothing that matters"
    if not difference(reused, computed) < NEAR:
        return f"is off by {difference(reused, computed):.0%} in a reuse at equal inputs"

    if not equal(Run(name, model, APART[:1]).outputs, expected[:1]):
        return "does not give the model back as it was"
    return None
