"""Blocks compiled with ``fullgraph=True`` stay whole, and are not compiled again, under a cache."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from benchmark.gpu.models import TINY
from benchmark.gpu.rows import OURS, StepPlan, our_config
from xfuser_adacorr import cache_summary, disable_cache, enable_cache

PLAN = StepPlan(number=6, computed=2)
CONFIGS = {name: our_config(name, PLAN) for name in OURS}
CONFIGS["literal"] = replace(CONFIGS["Fast+AdaCorrection"], adacorr_mode="literal")


def generate(model, pipe):
    TINY[model].generate(pipe, PLAN.number)


@pytest.fixture(scope="module", params=TINY)
def compiled(request):
    """(model, its pipeline with compiled blocks)."""
    torch._dynamo.reset()
    pipe = TINY[request.param].make(torch.device("cpu"), torch.float32)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    return request.param, pipe


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_whole_graphs_and_not_compiled_again(compiled, name):
    model, pipe = compiled
    enable_cache(pipe, CONFIGS[name])
    generate(model, pipe)  # counts FLOPs uncompiled, and compiles what is not yet compiled
    graphs = counters["stats"]["unique_graphs"]
    generate(model, pipe)
    reused = cache_summary(pipe).reused_steps
    disable_cache(pipe)
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert reused >= PLAN.number - PLAN.computed - 2  # two may be forced at the end


def test_methods_share_the_graphs(compiled):
    """A method that comes after another one finds the blocks compiled."""
    model, pipe = compiled
    enable_cache(pipe, CONFIGS["Tea"])
    generate(model, pipe)
    disable_cache(pipe)
    graphs = counters["stats"]["unique_graphs"]
    enable_cache(pipe, CONFIGS["Fast"])
    generate(model, pipe)
    disable_cache(pipe)
    assert counters["stats"]["unique_graphs"] == graphs
