"""Tiny pipelines are what the tests of caches take them for: repeatable, and counted right."""

import pytest
import torch

from tests.pipelines import CASES, counted_calls, evaluations, run


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_builds_and_runs_are_repeatable(case):
    pipe = case.build()
    first = run(case, pipe)
    assert first.dtype == torch.float32 and first.isfinite().all()
    assert first.std() > 0.01, "the output says nothing"
    assert torch.equal(run(case, pipe), first)
    assert torch.equal(run(case, case.build()), first)
    assert not torch.equal(run(case, pipe, seed=1), first)


def test_another_shape_is_sampled(case):
    pipe = case.build()
    larger = run(case, pipe, larger=True)
    assert larger.isfinite().all()
    assert larger.numel() > run(case, pipe).numel()


@pytest.mark.parametrize("steps", [None, 4])
def test_denoisers_are_called_as_the_case_says(case, steps):
    pipe = case.build()
    with counted_calls(case, pipe) as calls:
        run(case, pipe, steps=steps)
    assert set(calls) == set(case.denoisers)
    if case.calls_a_step is not None:
        assert calls.total() == case.calls_a_step * evaluations(case, steps)


def test_every_weight_that_is_drawn_matters_to_the_output(case):
    """A denoiser whose output were ignored would let any cache pass."""
    pipe = case.build()
    plain = run(case, pipe)
    for name in case.denoisers:
        other = case.build()
        with torch.no_grad():
            for parameter in getattr(other, name).parameters():
                parameter.mul_(1.1)
        assert not torch.equal(run(case, other), plain), name
