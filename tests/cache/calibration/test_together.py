"""What ranks that calibrate together refuse, and the order in which a rank makes its calls."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from tests.cache.methods.test_learned import SAMPLERS, STEPS, Loop
from xfuser_adacorr import Auto, calibrate_learned
from xfuser_adacorr.model_executor.cache.calibration import together
from xfuser_adacorr.model_executor.cache.calibration.learned_runs import ClosedLoop
from xfuser_adacorr.model_executor.cache.calibration.prompt_calls import batched_calls
from xfuser_adacorr.model_executor.cache.calibration.together import ALONE, Together
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.xfuser_adapters.scope import check_method


def ranks(scope=None, replicas=None):
    """As if these many ranks shared a sample, or had a pipeline each."""
    scope = DecisionScope() if scope is None else SimpleNamespace(is_parallel=True, group=scope)
    return Together(scope, replicas)


@pytest.fixture
def three_replicas(monkeypatch):
    monkeypatch.setattr(together, "get_world_size", lambda group: 3)
    monkeypatch.setattr(together, "get_rank", lambda group: group)
    return [ranks(replicas=rank) for rank in range(3)]


@pytest.mark.parametrize("count", [3, 4, 8, 24])
def test_replicas_divide_all_calls_in_their_order(three_replicas, count):
    calls = list(range(count))
    shares = [list(each.share(calls)) for each in three_replicas]
    assert [*chain(*shares)] == calls
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    firsts = [each.first_of(calls) for each in three_replicas]
    assert [share[0] for share in shares] == firsts
    assert [each.is_first for each in three_replicas] == [True, False, False]


def test_calls_that_cannot_be_divided_are_refused(three_replicas):
    pipe, calls = SimpleNamespace(), [{"seeds": [0, 1]}, {"seeds": [2, 3]}]
    with pytest.raises(ValueError, match="prompts: 2 calls cannot be divided over 3 replicas"):
        three_replicas[0].check_calls(pipe, calls, 2)
    own = SimpleNamespace(engine_config=None)  # xfuser's pipeline, which divides lists too
    with pytest.raises(ValueError, match="batch_size must be 1 on SimpleNamespace"):
        three_replicas[0].check_calls(own, calls * 2, 2)
    three_replicas[0].check_calls(own, calls * 2, 1)


def test_batches_of_two_sizes_are_refused_where_ranks_share_a_sample():
    uneven = batched_calls(["a", "b", "c"], 2, 0, {})
    with pytest.raises(ValueError, match="batch_size: 2 must divide the number of prompts"):
        ranks(scope=0).check_calls(SimpleNamespace(), uneven, 2)
    ALONE.check_calls(SimpleNamespace(), uneven, 2)


def test_pipefusion_is_refused(monkeypatch):
    monkeypatch.setattr(together, "find_stage", lambda model: object())
    pipe = Loop(SAMPLERS["flow"]())
    with pytest.raises(ValueError, match="calibration: not under PipeFusion"):
        calibrate_learned(pipe, [{"label": [0]}], num_inference_steps=STEPS, output="plan.json")
    with pytest.raises(ValueError, match="learn must be None under PipeFusion"):
        check_method(Auto(learn=1), DecisionScope(), object())


def test_replicas_are_a_group():
    pipe = Loop(SAMPLERS["flow"]())
    with pytest.raises(TypeError, match="replicas must be a torch.distributed ProcessGroup"):
        calibrate_learned(pipe, [{"label": [0]}], num_inference_steps=STEPS, replicas=2)


def test_one_process_hears_itself():
    sums = torch.randn(3, 2)
    assert torch.equal(ALONE.samples(sums), sums) and ALONE.is_first
    assert ALONE.heard("x") == ["x"] and ALONE.of_calls([1, None]) == [1, None]
    assert ALONE.by_first(lambda: 5) == 5
    with pytest.raises(OSError, match="full"):
        ALONE.by_first(lambda: (_ for _ in ()).throw(OSError("full")))


def test_calls_are_made_by_turns_in_one_order():
    """On ranks that share samples the same call has to run on all of them at once."""
    pipe, order = Loop(SAMPLERS["flow"]()), []
    calls = batched_calls([{"label": [k]} for k in range(4)], 1, 0, {"num_inference_steps": STEPS})
    loop = ClosedLoop(pipe, {"transformer": pipe.transformer}, calls)
    loop.record()
    noted = lambda module, inputs: order.append(int(inputs[1]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(noted)
    for _ in range(3):
        order.clear()
        loop.follow((0, 3, 7))
        assert order == [0, 1, 2, 3] * 3
