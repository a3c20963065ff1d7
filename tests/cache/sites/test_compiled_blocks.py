"""Blocks compiled with ``fullgraph=True`` stay whole, and are not compiled again, under a cache."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny_families import FAMILIES, NAMES, FamilySampler, loose
from xfuser_adacorr import CacheConfig, Schedule, cache_summary, disable_cache, enable_cache

STEPS = 6
CONFIGS = {name: loose(name) for name in NAMES if "+" in name or name == "Auto"} | {
    name: CacheConfig.from_name(name, rel_l1_thresh=100.0) for name in ("Fb", "Tea", "Fast")
}
CONFIGS["Ada"] = CacheConfig(use_cache="Ada", codebook={1e9: 3})
CONFIGS["Ada+AdaCorrection"] = CacheConfig(
    use_cache="Ada", codebook={1e9: 3}, enable_adacorrection=True, adacorr_gamma=0.0
)
CONFIGS["Schedule"] = Schedule(steps=[0, 3])
CONFIGS["literal"] = CacheConfig(
    use_cache="Fast", rel_l1_thresh=100.0, enable_adacorrection=True, adacorr_mode="literal"
)
COMPILED = [tiny for tiny in FAMILIES if tiny.name in ("pixart", "opensora", "opensora2")]


@pytest.fixture(scope="module", params=COMPILED, ids=lambda tiny: tiny.name)
def compiled(request):
    """A sampler of a model with compiled blocks."""
    torch._dynamo.reset()
    counters.clear()
    sampler = FamilySampler(request.param)
    for block in request.param.blocks(sampler.model):
        block.compile(fullgraph=True, backend="eager")
    return sampler


PAIRS = [(COMPILED[i % len(COMPILED)], name) for i, name in enumerate(CONFIGS)]
"""Every method on one of the families."""


@pytest.mark.parametrize(
    ("compiled", "name"),
    PAIRS,
    ids=[f"{t.name}-{name}" for t, name in PAIRS],
    indirect=["compiled"],
)
def test_blocks_are_whole_graphs_and_not_compiled_again(compiled, name):
    enable_cache(compiled.model, CONFIGS[name], scheduler=compiled.scheduler)
    compiled.run(STEPS)  # compiles what is not yet compiled
    graphs = counters["stats"]["unique_graphs"]
    compiled.run(STEPS)
    reused = cache_summary(compiled.model).reused_steps
    disable_cache(compiled.model)
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert reused >= 2


def test_methods_share_the_graphs(compiled):
    """A method that comes after another one finds the blocks compiled."""
    enable_cache(compiled.model, CONFIGS["Tea"], scheduler=compiled.scheduler)
    compiled.run(STEPS)
    disable_cache(compiled.model)
    graphs = counters["stats"]["unique_graphs"]
    enable_cache(compiled.model, CONFIGS["Fast"], scheduler=compiled.scheduler)
    compiled.run(STEPS)
    disable_cache(compiled.model)
    assert counters["stats"]["unique_graphs"] == graphs
