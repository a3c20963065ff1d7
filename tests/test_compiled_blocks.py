"""Blocks compiled with ``fullgraph=True`` stay whole, and are not compiled again, under a cache."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from benchmark.gpu_models import TINY
from benchmark.gpu_rows import OURS, Schedule, our_config
from xfuser_adacorr import cache_summary, enable_cache

SCHEDULE = Schedule(steps=7, computed=3)
CONFIGS = {name: our_config(name, SCHEDULE) for name in OURS}
CONFIGS["literal"] = replace(CONFIGS["Fast+AdaCorrection"], adacorr_mode="literal")
KINDS_OF_BLOCK = 2
"""FLUX: two classes. Open-Sora: spatial blocks, and temporal ones, which get rotary positions."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", TINY)
def test_one_graph_a_kind_of_block(model, name):
    pipe = TINY[model].make(torch.device("cpu"), torch.float32)
    enable_cache(pipe, CONFIGS[name])
    TINY[model].generate(pipe, SCHEDULE.steps)
    decisions = [call.refreshed for call in cache_summary(pipe).trace.calls]
    assert name == "literal" or not all(decisions)

    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for _ in range(2):
        TINY[model].generate(pipe, SCHEDULE.steps)
        assert counters["stats"]["unique_graphs"] == KINDS_OF_BLOCK
        assert not counters["graph_break"]
        assert [call.refreshed for call in cache_summary(pipe).trace.calls] == decisions
