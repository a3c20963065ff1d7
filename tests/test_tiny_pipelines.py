"""Tiny pipelines are what the tests of caches take them for: repeatable, and counted right."""

import pytest
import torch

from tests.pipelines import CASES, counted_calls, evaluations, run

SHORT = 3
"""Steps of a run where a whole one is not needed."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(case):
    return case.build()


@pytest.fixture(scope="module")
def plain(case, pipe):
    """The output of a whole run and the counted calls."""
    return counted_run(case, pipe, case.steps)


@pytest.fixture(scope="module")
def short(case, pipe):
    return counted_run(case, pipe, SHORT)


def counted_run(case, pipe, steps):
    with counted_calls(case, pipe) as calls:
        return run(case, pipe, steps=steps), calls


def test_builds_and_runs_are_repeatable(case, pipe, plain):
    first, _ = plain
    assert first.dtype == torch.float32 and first.isfinite().all()
    assert first.std() > 0.01, "the output says nothing"
    assert torch.equal(run(case, pipe), first)
    assert torch.equal(run(case, case.build()), first)


def test_another_shape_is_sampled(case, pipe, plain):
    larger = run(case, pipe, larger=True)
    assert larger.isfinite().all()
    assert larger.numel() > plain[0].numel()


def test_denoisers_are_called_as_the_case_says(case, plain, short):
    for steps, (_, calls) in ((case.steps, plain), (SHORT, short)):
        assert set(calls) == set(case.denoisers)
        if case.calls_a_step is not None:
            assert calls.total() == case.calls_a_step * evaluations(case, steps)


def test_the_seed_matters(case, pipe, short):
    assert not torch.equal(run(case, pipe, steps=SHORT, seed=1), short[0])


def test_every_denoiser_matters_to_the_output(case, short):
    """Were an output ignored, any cache would pass."""
    for name in case.denoisers:
        other = case.build()
        with torch.no_grad():
            for parameter in getattr(other, name).parameters():
                parameter.mul_(1.1)
        assert not torch.equal(run(case, other, steps=SHORT), short[0]), name
