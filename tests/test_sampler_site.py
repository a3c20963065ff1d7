"""Skipping whole sampler steps, on tiny pipelines of diffusers: exact, repeatable, and undone.

Before that, that the pipelines are what these tests take them for: counted right, and heard.
"""

from contextlib import contextmanager
from itertools import groupby

import pytest
import torch

from tests.pipelines import CASES, counted_calls, evaluations, run
from xfuser_adacorr import cache_summary, disable_cache, enable_cache

EVERY = 3
SHORT = 3
"""Steps of a run where a whole one is not needed."""


def enabled(case):
    """A new pipeline that computes every so many steps."""
    return enable_cache(case.build(), "Schedule", schedule=EVERY, stand_in="forecast")


def solver_steps(case):
    """Both evaluations of a step of Heun's are one step; PNDM's second one is a step."""
    return case.steps + case.extra_evaluations


def computed_steps(case):
    """Step 0, and every third counted from the last."""
    last = solver_steps(case) - 1
    return [step for step in range(last + 1) if step == 0 or (last - step) % EVERY == 0]


@contextmanager
def noted_timesteps(case, pipe):
    """The timestep of every computed call of a denoiser, in their order."""
    noted = []

    def note(module, args, kwargs):
        named = [kwargs[name] for name in ("timestep", "timesteps") if name in kwargs]
        timestep = named[0] if named else args[1]
        noted.append(float(torch.as_tensor(timestep).max()))

    handles = [
        getattr(pipe, name).register_forward_pre_hook(note, with_kwargs=True)
        for name in case.denoisers
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def in_computed_steps(case, timesteps):
    """The calls of a plain run that belong to computed steps.

    A call that no step before had, as that of a branch which begins later, is computed, too.
    """
    if case.calls_a_step is None:
        evaluations = [list(calls) for _, calls in groupby(timesteps)]
    else:
        starts = range(0, len(timesteps), case.calls_a_step)
        evaluations = [timesteps[i : i + case.calls_a_step] for i in starts]
    steps, expected, seen = computed_steps(case), [], 0
    for i, calls in enumerate(evaluations):
        expected += calls if i // case.order in steps else calls[seen:]
        seen = max(seen, len(calls))
    return expected


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def uncached(case):
    return case.build()


@pytest.fixture(scope="module")
def noted(case, uncached):
    """A run without a cache: its output, and the timesteps of its calls."""
    with noted_timesteps(case, uncached) as timesteps:
        return run(case, uncached), timesteps


@pytest.fixture(scope="module")
def plain(noted):
    return noted[0]


@pytest.fixture(scope="module")
def short(case, uncached):
    """A short run without a cache, and the counted calls."""
    with counted_calls(case, uncached) as calls:
        return run(case, uncached, steps=SHORT), calls


@pytest.fixture(scope="module")
def pipe(case):
    """One pipeline for all runs that have to leave nothing behind."""
    return enabled(case)


@pytest.fixture(scope="module")
def first(case, pipe):
    """The first run of that pipeline: its output, the timesteps of its calls, and its summary."""
    with noted_timesteps(case, pipe) as timesteps:
        return run(case, pipe), timesteps, cache_summary(pipe)


# -- the pipelines --------------------------------------------------------------------------------


def test_denoisers_are_called_as_the_case_says(case, noted, short):
    output, timesteps = noted
    assert output.dtype == torch.float32 and output.isfinite().all()
    assert output.std() > 0.01, "the output says nothing"
    _, calls = short
    assert set(calls) == set(case.denoisers)
    if case.calls_a_step is not None:
        assert len(timesteps) == case.calls_a_step * evaluations(case)
        assert calls.total() == case.calls_a_step * evaluations(case, SHORT)


def test_the_seed_matters(case, uncached, short):
    assert not torch.equal(run(case, uncached, steps=SHORT, seed=1), short[0])


def test_every_denoiser_matters_to_the_output(case, short):
    """Were an output ignored, any cache would pass."""
    for name in case.denoisers:
        other = case.build()
        with torch.no_grad():
            for parameter in getattr(other, name).parameters():
                parameter.mul_(1.1)
        assert not torch.equal(run(case, other, steps=SHORT), short[0]), name


# -- skipping -------------------------------------------------------------------------------------


def test_a_schedule_that_computes_every_step_is_bit_equal(case, uncached, plain):
    enable_cache(uncached, "Schedule", schedule=1, stand_in="forecast")
    try:
        assert torch.equal(run(case, uncached), plain)
        summary = cache_summary(uncached)
    finally:
        disable_cache(uncached)
    assert summary.computed_steps == summary.num_steps
    assert case.irregular or summary.num_steps == solver_steps(case)


def test_denoisers_are_called_in_computed_steps_alone(case, noted, first):
    plain, timesteps = noted
    result, computed, summary = first
    if case.irregular:
        assert 0 < len(computed) < len(timesteps) and set(computed) <= set(timesteps)
    else:
        assert computed == in_computed_steps(case, timesteps)
    assert result.isfinite().all() and not torch.equal(result, plain)
    assert summary.num_steps == summary.computed_steps + summary.reused_steps
    if case.irregular:  # other calls than before are a refresh; the summary is of the last loop
        assert 0 < summary.computed_steps < summary.num_steps
    else:
        assert summary.num_steps == solver_steps(case)
        assert summary.computed_steps == len(computed_steps(case))


@pytest.mark.one_of_a_kind
def test_a_second_run_repeats_the_first(case, pipe, first):
    assert torch.equal(run(case, pipe), first[0])


@pytest.mark.one_of_a_kind
def test_another_shape_starts_anew(case, pipe, plain, first):
    larger = run(case, pipe, larger=True)
    assert larger.isfinite().all() and larger.numel() > plain.numel()
    assert torch.equal(larger, run(case, enabled(case), larger=True))
    assert torch.equal(run(case, pipe), first[0])


@pytest.mark.one_of_a_kind
def test_a_run_after_an_exception_starts_anew(case, pipe, first):
    middle, seen = len(first[1]) // 2 + 1, 0

    def fail(module, args):
        nonlocal seen
        seen += 1
        if seen == middle:
            raise OSError("the device is gone")

    handles = [getattr(pipe, name).register_forward_pre_hook(fail) for name in case.denoisers]
    with pytest.raises(OSError, match="the device is gone"):
        run(case, pipe)
    for handle in handles:
        handle.remove()
    assert torch.equal(run(case, pipe), first[0])


@pytest.mark.one_of_a_kind
def test_disabling_restores_the_pipeline(case, noted):
    plain, timesteps = noted
    pipe = case.build()
    parts = [getattr(pipe, name) for name in (*case.denoisers, "scheduler")]
    before = [(type(part), set(vars(part))) for part in parts]
    enable_cache(pipe, "Schedule", schedule=EVERY, stand_in="forecast")
    disable_cache(pipe)
    assert [(type(part), set(vars(part))) for part in parts] == before
    enable_cache(pipe, "Schedule", schedule=EVERY, stand_in="forecast")
    run(case, pipe)
    disable_cache(pipe)
    assert [type(part) for part in parts] == [kind for kind, _ in before]
    with noted_timesteps(case, pipe) as again:
        assert torch.equal(run(case, pipe), plain)
    assert again == timesteps
