"""Tiny pipelines are what the tests of caches take them for: repeatable, and counted right."""

import pytest
import torch

from tests.pipelines import CASES, counted_calls, evaluations, run


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(case):
    return case.build()


@pytest.fixture(scope="module")
def plain(case, pipe):
    return run(case, pipe)


def test_builds_and_runs_are_repeatable(case, pipe, plain):
    assert plain.dtype == torch.float32 and plain.isfinite().all()
    assert plain.std() > 0.01, "the output says nothing"
    assert torch.equal(run(case, pipe), plain)
    assert torch.equal(run(case, case.build()), plain)


def test_the_seed_matters(case, pipe, plain):
    assert not torch.equal(run(case, pipe, seed=1), plain)


def test_another_shape_is_sampled(case, pipe, plain):
    larger = run(case, pipe, larger=True)
    assert larger.isfinite().all()
    assert larger.numel() > plain.numel()


def test_denoisers_are_called_as_the_case_says(case, pipe):
    for steps in (case.steps, 3):
        with counted_calls(case, pipe) as calls:
            run(case, pipe, steps=steps)
        assert set(calls) == set(case.denoisers)
        if case.calls_a_step is not None:
            assert calls.total() == case.calls_a_step * evaluations(case, steps)


def test_every_denoiser_matters_to_the_output(case, plain):
    """Were an output ignored, any cache would pass."""
    for name in case.denoisers:
        other = case.build()
        with torch.no_grad():
            for parameter in getattr(other, name).parameters():
                parameter.mul_(1.1)
        assert not torch.equal(run(case, other), plain), name
