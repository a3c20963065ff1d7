"""Blocks compiled with ``fullgraph=True`` stay whole, and are not compiled again, under a cache."""

from functools import cache

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny_families import BY_NAME, NAMES, FamilySampler, loose
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
FAMILIES = ("pixart", "opensora", "opensora2")


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


@cache
def compiled(family):
    """A sampler of a model with compiled blocks, one for all tests."""
    tiny = BY_NAME[family]
    sampler = FamilySampler(tiny)
    for block in tiny.blocks(sampler.model):
        block.compile(fullgraph=True, backend="eager")
    return sampler


def unique_graphs(sampler, name):
    """Graphs that were compiled so far, after a run; and what the run reused."""
    enable_cache(sampler.model, CONFIGS[name], scheduler=sampler.scheduler)
    sampler.run(STEPS)
    reused = cache_summary(sampler.model).reused_steps
    disable_cache(sampler.model)
    return counters["stats"]["unique_graphs"], reused


@pytest.mark.parametrize(
    ("family", "name"), [(FAMILIES[i % len(FAMILIES)], name) for i, name in enumerate(CONFIGS)]
)
def test_blocks_are_whole_graphs_and_not_compiled_again(family, name):
    """Every method on one of the families."""
    sampler = compiled(family)
    graphs, _ = unique_graphs(sampler, name)  # compiles what is not yet compiled
    again, reused = unique_graphs(sampler, name)
    assert 0 < graphs == again
    assert not counters["graph_break"]
    assert reused >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_share_the_graphs(family):
    """A method that comes after another one finds the blocks compiled."""
    sampler = compiled(family)
    graphs, _ = unique_graphs(sampler, "Tea")
    assert unique_graphs(sampler, "Fast")[0] == graphs
