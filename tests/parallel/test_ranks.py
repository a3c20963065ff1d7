"""What a decision sends, which options ranks refuse, and what is imported: in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xfuser_adacorr import CacheConfig, DecisionScope, enable_cache
from xfuser_adacorr.model_executor.cache.methods.fast import packed_tests, unpacked_tests
from xfuser_adacorr.model_executor.cache.ranks import MAX_REDUCED_SUMS
from xfuser_adacorr.model_executor.cache.signals import Read, Signal, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count", [1, 5, 14, 15, 57, 100])
def test_packed_block_tests_keep_each_blocks_outcome_up_to_14_blocks(count):
    """Two ranks' packed sums added up, against the ratios of all tokens."""
    generator = torch.Generator().manual_seed(count)
    ranks = torch.rand(2, 2 * count, generator=generator)
    threshold = 0.9
    packed = [packed_tests(list(rank), threshold, MAX_REDUCED_SUMS) for rank in ranks]
    assert all(len(sums) <= MAX_REDUCED_SUMS for sums in packed)
    added = [float(a + b) for a, b in zip(*packed, strict=True)]
    change, run_blocks = unpacked_tests(added, count, MAX_REDUCED_SUMS)
    differences, references = ranks.double().sum(0)[::2], ranks.double().sum(0)[1::2]
    together = -(-count // 14)
    pairs = zip(differences.split(together), references.split(together), strict=True)
    expected = []
    for difference, reference in pairs:
        ratio = (difference.sum() / reference.sum()).sqrt().item()
        expected += [ratio > threshold] * len(difference)
    assert list(run_blocks) == expected
    assert change == pytest.approx((differences.sum() / references.sum()).sqrt().item(), rel=1e-5)


def test_scope_and_check_ranks_are_checked(transformer):
    with pytest.raises(TypeError, match="scope must be a DecisionScope"):
        enable_cache(transformer, "Auto", scope="world")
    with pytest.raises(TypeError, match="check_ranks must be True or False"):
        enable_cache(transformer, "Auto", check_ranks=1)
    with pytest.raises(TypeError, match="group must be a torch.distributed ProcessGroup"):
        DecisionScope(group=[0, 1])


@pytest.fixture
def group_of_one():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_what_ranks_could_not_decide_alike_is_refused(transformer, group_of_one):
    scope = DecisionScope(group_of_one)
    static = CacheConfig(use_cache="Fast", static_tokens=True)
    with pytest.raises(ValueError, match="static_tokens must be False"):
        enable_cache(transformer, static, scope=scope)
    literal = CacheConfig(enable_adacorrection=True, use_cache="Fb", adacorr_mode="literal")
    with pytest.raises(ValueError, match="adacorr_mode must be 'adaptive'"):
        enable_cache(transformer, literal, scope=scope)


def test_a_decision_cannot_send_more_than_64_bytes(group_of_one):
    scope = DecisionScope(group_of_one)
    sums = [torch.tensor(1.0)] * (MAX_REDUCED_SUMS + 1)
    with pytest.raises(ValueError, match="at most 16 sums"):
        read([Signal(sums)], scope)
    assert read([Signal(sums[:-1])], scope) == [Read([1.0] * MAX_REDUCED_SUMS)]


def test_importing_the_package_leaves_xfuser_alone():
    script = (
        "import sys, xfuser_adacorr; xfuser_adacorr.enable_cache; "
        "sys.exit(any(name.split('.')[0] == 'xfuser' for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
