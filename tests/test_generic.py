"""Families that are inferred: the stack methods on tiny models of diffusers' transformers."""

import pytest
import torch
from torch import nn

from tests.tiny_models import MODELS, TinyModel
from xfuser_adacorr import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.blocks import block_stack
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import register_family
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import infer_family

METHODS = ("Fb", "Tea", "Ada", "Fast")
LEVELS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
REUSED = 2
"""Index of a call that no method is forced to compute."""


class Run:
    """Calls of a model along a sampling run, with the blocks counted that each one executed."""

    def __init__(self, tiny: TinyModel, model: nn.Module, stack: list[nn.Module]) -> None:
        self.counts: list[int] = []
        self.outputs: list[torch.Tensor] = []
        handles = [block.register_forward_hook(self._count) for block in stack]
        for level in LEVELS:
            self.counts.append(0)
            self.outputs.append(sample_in(model(**tiny.inputs(level))))
        for handle in handles:
            handle.remove()

    def _count(self, *_: object) -> None:
        self.counts[-1] += 1


def sample_in(output) -> torch.Tensor:
    if not isinstance(output, torch.Tensor):
        output = output[0]
    return output if isinstance(output, torch.Tensor) else torch.stack(list(output))


def inferred(model: nn.Module) -> list[nn.Module]:
    """Register what is inferred, also for a class that is known by hand; returns the blocks."""
    family = register_family(infer_family(model))
    return [block for block, _ in block_stack(model, family)]


def cases(models):
    return [pytest.param(MODELS[name], id=name) for name in models]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tiny", cases(MODELS))
def test_a_stack_method_runs_on_an_inferred_family(tiny, method, own_registry):
    model = tiny.make()
    stack = inferred(model)
    plain = Run(tiny, model, stack)
    assert plain.counts == [len(stack)] * len(LEVELS)

    enable_cache(model, method, rel_l1_thresh=0.0, num_steps=len(LEVELS))
    never = Run(tiny, model, stack)
    disable_cache(model)
    for i, (ours, theirs) in enumerate(zip(never.outputs, plain.outputs, strict=True)):
        assert torch.equal(ours, theirs), i

    enable_cache(model, method, rel_l1_thresh=1e6, num_steps=len(LEVELS))
    often = Run(tiny, model, stack)
    disable_cache(model)
    assert often.counts[0] == len(stack)
    assert often.counts[REUSED] <= (method == "Fb")
    assert all(output.isfinite().all() for output in often.outputs)
    assert torch.equal(often.outputs[0], plain.outputs[0])
    assert not torch.equal(often.outputs[REUSED], plain.outputs[REUSED])

    assert type(model).__name__ == tiny.name
    after = Run(tiny, model, stack)
    assert all(map(torch.equal, after.outputs, plain.outputs))
