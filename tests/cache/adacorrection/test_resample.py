"""Repair of multistep samplers: what it computes, what survives it, and what it leaves behind."""

import copy
import functools
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tests.cache.test_run import STATED_FLOATS
from tests.cached import computed
from tests.samplers import (
    FLOW,
    REPLAYED,
    SCHEDULERS,
    Loop,
    damped_further,
    linear_loop,
    relative_error,
)
from xfuser_adacorr import (
    AdaCorrection,
    CacheConfig,
    Schedule,
    cache_summary,
    disable_cache,
    enable_cache,
)
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.forecasts import DampedLine
from xfuser_adacorr.model_executor.cache.intercept import is_intercepted

STEPS = 14
LOOSE = CacheConfig(use_cache="Auto", adacorr_tolerance=0.3)
every_resampled = pytest.mark.parametrize("name", REPLAYED)


def between(nodes, sigma):
    """The line through two ``nodes`` (sigma -> output), at ``sigma``."""
    (a, va), (b, vb) = nodes.items()
    w = (sigma - a) / (b - a)
    return (1.0 - w) * va + w * vb


def through(nodes, sigma):
    """The polynomial through all ``nodes``, at ``sigma``."""
    values = 0.0
    for a, va in nodes.items():
        others = [(sigma - b) / (a - b) for b in nodes if b != a]
        values = values + math.prod(others) * va
    return values


def test_repair_is_what_it_says():
    """Refreshes at 0-3, 6, 7 and the repair at 6 written out, with a transformer not linear."""
    options = {**FLOW, "flow_shift": 1.0}
    loop = Loop(DPMSolverMultistepScheduler(**options))
    schedule = Schedule(steps=[0, 1, 2, 3, 6, 7], correction=AdaCorrection())
    enable_cache(loop.transformer, schedule, scheduler=loop.scheduler)
    carried = {}
    loop.run(8, callback=lambda i, x: carried.setdefault(i, x))
    assert computed(cache_summary(loop.transformer)) == [0, 1, 2, 3, 6, 7]
    disable_cache(loop.transformer)

    solver, x = DPMSolverMultistepScheduler(**options), loop.flux.noise()
    outputs, expected = {}, {}
    solver.set_timesteps(8)
    sigmas, times = solver.sigmas.tolist(), list(solver.timesteps)

    def advance(sampler, index, output, x):
        expected[index] = sampler.step(output, times[index], x, return_dict=False)[0]
        return expected[index]

    for i in range(4):
        outputs[sigmas[i]] = loop.flux.call(x, times[i])
        x = advance(solver, i, outputs[sigmas[i]], x)
    saved, x_saved = copy.deepcopy(solver), x
    line = {s: outputs[s] for s in sigmas[2:4]}
    nodes, damping = list(outputs.items()), 1.0
    for i in (2, 3):
        damping = damped_further(damping, nodes[i], nodes[i - 1], nodes[i - 2])
    for i in (4, 5):
        forecast = damping * between(line, sigmas[i]) + (1 - damping) * outputs[sigmas[3]]
        x = advance(solver, i, forecast, x)
    fresh = loop.flux.call(x, times[6])
    blend = {**line, sigmas[6]: fresh}
    x = x_saved
    for i in (4, 5):
        x = saved.step(through(blend, sigmas[i]), times[i], x, return_dict=False)[0]
    x = advance(saved, 6, fresh, x)
    advance(saved, 7, loop.flux.call(x, times[7]), x)
    for i in range(8):
        torch.testing.assert_close(carried[i], expected[i], rtol=1e-4, atol=1e-5)
    assert relative_error(carried[6], solver.step(fresh, times[6], x)[0]) > 1e-3


@pytest.mark.parametrize("lost", [True, False])
@every_resampled
def test_forecasts_stay_where_the_forecast_is_lost(name, lost, monkeypatch):
    """The sampler is set back, and goes through the skipped steps as it did before."""
    own = DampedLine.missed

    def missed(forecast, step, fresh):
        found = own(forecast, step, fresh)
        forecast.lost = torch.tensor(lost)
        return found

    monkeypatch.setattr(DampedLine, "missed", missed)
    loop, ends = Loop(SCHEDULERS[name]()), []
    for given in ({"correction": AdaCorrection()}, {"forecast": "line"}):
        schedule = Schedule(steps=[0, 1, 4, 7, 11], **given)
        enable_cache(loop.transformer, schedule, scheduler=loop.scheduler)
        ends.append(loop.run(STEPS))
        disable_cache(loop.transformer)
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6) is lost


@every_resampled
def test_callbacks_see_the_corrected_latents(name):
    loop, plain, seen = linear_loop(name), {}, {}
    loop.run(STEPS, callback=lambda i, x: plain.setdefault(i, x))
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    loop.run(STEPS, callback=lambda i, x: seen.setdefault(i, x))
    calls = cache_summary(loop.transformer).trace.calls
    errors = {c.step_index: relative_error(seen[c.step_index], plain[c.step_index]) for c in calls}
    repaired = max(errors[c.step_index] for c in calls if c.refreshed)
    assert repaired < 1e-4
    first = next(c.step_index for c in calls if c.refreshed and c.step_index)
    assert errors[first - 1] > 2 * repaired  # reused before anything could be known


@pytest.mark.parametrize(
    ("name", "in_place"), [(name, bool(i % 2)) for i, name in enumerate(REPLAYED)]
)
def test_what_a_callback_adds_survives(name, in_place):
    generator = torch.Generator().manual_seed(9)
    changes = {i: 0.1 * torch.randn(1, 16, 8, generator=generator) for i in (0, 1, 2, 4, 5, 9)}

    def callback(i, x):
        if i not in changes:
            return x
        return x.add_(changes[i]) if in_place else x + changes[i]

    loop = linear_loop(name)
    plain = loop.run(STEPS, callback=callback)
    assert relative_error(plain, loop.run(STEPS)) > 0.01
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    x = loop.run(STEPS, callback=callback)
    assert cache_summary(loop.transformer).reused_steps > 2
    assert relative_error(x, plain) < 1e-4


def test_repair_works_in_inference_mode():
    loop = linear_loop("dpm-2-flow")
    change = torch.ones(1, 16, 8)
    with torch.inference_mode():
        plain = loop.run(STEPS, callback=lambda i, x: x.add_(change) if i == 2 else x)
        enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
        x = loop.run(STEPS, callback=lambda i, x: x.add_(change) if i == 2 else x)
    assert relative_error(x, plain) < 1e-4


# -- the scheduler taken over ---------------------------------------------------------------------


@every_resampled
def test_the_scheduler_is_given_back_by_disabling(name):
    loop = linear_loop(name)
    loop.run(6)
    plain, attributes = type(loop.scheduler), set(vars(loop.scheduler))
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    loop.run(6)
    loop.run(6, stop_after=3)
    assert is_intercepted(loop.scheduler) and isinstance(loop.scheduler, plain)
    disable_cache(loop.transformer)
    assert type(loop.scheduler) is plain and not is_intercepted(loop.scheduler)
    assert set(vars(loop.scheduler)) == attributes


def test_an_exception_in_the_model_leaves_nothing_behind():
    loop = Loop(SCHEDULERS["unipc"]())
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    plain = loop.run(STEPS)
    forward = loop.transformer.proj_out.register_forward_hook(
        lambda *a: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        loop.run(STEPS)
    assert site_of(loop.transformer).tracker.run is None
    forward.remove()
    assert torch.equal(loop.run(STEPS), plain)


def test_an_exception_in_the_scheduler_leaves_nothing_behind(monkeypatch):
    loop = Loop(SCHEDULERS["unipc"]())
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    plain, convert = loop.run(STEPS), UniPCMultistepScheduler.convert_model_output

    def failing(self, *args, **kwargs):
        if self.step_index == 3:
            raise OSError
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(UniPCMultistepScheduler, "convert_model_output", failing)
    with pytest.raises(OSError):
        loop.run(STEPS)
    tracker = site_of(loop.transformer).tracker
    assert tracker.run is None and not tracker.latest.tracks
    monkeypatch.undo()
    assert torch.equal(loop.run(STEPS), plain)


def test_a_pipeline_may_change_its_scheduler_between_runs():
    loop = Loop(SCHEDULERS["dpm-2-flow"]())
    pipe = SimpleNamespace(transformer=loop.transformer, scheduler=loop.scheduler)
    enable_cache(pipe, LOOSE)
    used, results = [], {}
    for name in ("dpm-2-flow", "unipc-3-flow", "flow-euler", "dpm-2-flow"):
        pipe.scheduler = loop.scheduler = SCHEDULERS[name]()
        used.append(loop.scheduler)
        loop.run(STEPS, stop_after=4)  # cancelled
        x = loop.run(STEPS)
        assert torch.equal(x, results.setdefault(name, x))
        assert cache_summary(pipe).reused_steps > 0
        loop.run(STEPS, stop_after=4)
        assert not any(is_intercepted(scheduler) for scheduler in used[:-1])
    disable_cache(pipe)
    assert not any(is_intercepted(scheduler) for scheduler in used)


def test_two_caches_take_turns_with_a_shared_scheduler():
    """The one whose model is called has it."""
    scheduler = SCHEDULERS["dpm-2-flow"]()
    first, second = Loop(scheduler), Loop(scheduler)
    for loop in (first, second):
        enable_cache(loop.transformer, LOOSE, scheduler=scheduler)
    expected = first.run(STEPS)
    for loop in (first, second, first):
        loop.run(STEPS, stop_after=4)
        for other in (second, first):
            assert torch.equal(other.run(STEPS), expected)
            assert cache_summary(other.transformer).reused_steps > 0
    disable_cache(first.transformer)
    assert torch.equal(second.run(STEPS), expected)
    disable_cache(second.transformer)
    assert type(scheduler) is DPMSolverMultistepScheduler


def test_a_scheduler_taken_over_saves_and_builds_plain_ones(tmp_path):
    loop = Loop(SCHEDULERS["dpm-2-flow"]())
    loop.scheduler.save_pretrained(tmp_path / "plain")
    signature = inspect.signature(loop.scheduler.step)
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    loop.run(STEPS, stop_after=3)
    taken = loop.scheduler
    assert isinstance(taken, DPMSolverMultistepScheduler) and is_intercepted(taken)
    assert inspect.signature(taken.step) == signature
    taken.save_pretrained(tmp_path / "taken")
    name = "scheduler_config.json"
    assert (tmp_path / "taken" / name).read_text() == (tmp_path / "plain" / name).read_text()
    pickled = pickle.loads(pickle.dumps(taken))
    for made in (pickled, type(taken).from_config(taken.config)):
        assert type(made) is DPMSolverMultistepScheduler and not is_intercepted(made)
        assert made.config == taken.config
    assert pickled.step_index == taken.step_index == 3


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_new_schedule_in_the_middle_repairs_nothing_old(stop_after):
    """The scheduler is stepped by itself after a run was cancelled: before or after a refresh."""
    loop = Loop(SCHEDULERS["dpm-2-flow"]())
    schedule = Schedule(steps=[0, 1, 3], correction=AdaCorrection())
    enable_cache(loop.transformer, schedule, scheduler=loop.scheduler)
    loop.run(STEPS, stop_after=stop_after + 1)
    loop.scheduler.set_timesteps(5)
    x = loop.flux.noise()
    expected = SCHEDULERS["dpm-2-flow"]()
    expected.set_timesteps(5)
    for t in loop.scheduler.timesteps:
        out, wanted = (s.step(x, t, x, return_dict=False)[0] for s in (loop.scheduler, expected))
        assert torch.equal(out, wanted)


# -- cost -----------------------------------------------------------------------------------------


def test_memory_of_the_repair_counts():
    """Latents before and after the skipped steps, and the solver's two earlier outputs."""
    loop = Loop(SCHEDULERS["dpm-2-flow"]())
    config = CacheConfig(use_cache="Auto", adacorr_gamma=0.0, warmup_steps=4)
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    loop.run(STEPS)
    floats = STATED_FLOATS["Auto"] + 4 * 16 * 8
    spatial = 1  # what a refresh found has been read while steps are skipped
    assert cache_summary(loop.transformer).cache_memory_bytes == 4 * (floats + spatial)


@pytest.mark.parametrize("make", [DDIMScheduler, SCHEDULERS["dpm-2-flow"], SCHEDULERS["pndm"]])
def test_no_host_read_is_added_by_the_repair(make, host_reads):
    loop = Loop(make())
    counts = {"call": [], "step": 0}
    call, original = loop.flux.call, type(loop.scheduler).step

    def counted_call(*args, **kwargs):
        before = len(host_reads)
        out = call(*args, **kwargs)
        counts["call"].append(len(host_reads) - before)
        return out

    loop.flux.call = counted_call

    class Counting(type(loop.scheduler)):
        @functools.wraps(original)
        def step(self, *args, **kwargs):
            before = len(host_reads)
            out = original(self, *args, **kwargs)
            counts["step"] += len(host_reads) - before
            return out

    loop.scheduler.__class__ = Counting
    loop.run(STEPS)
    plain_calls, plain_steps = counts["call"], counts["step"]
    counts.update(call=[])
    enable_cache(loop.transformer, LOOSE, scheduler=loop.scheduler)
    loop.run(STEPS)
    counts.update(call=[], step=0)
    loop.run(STEPS)
    assert cache_summary(loop.transformer).reused_steps > 2
    pairs = zip(counts["call"][1:], plain_calls[1:], strict=True)
    assert all(now - before <= 1 for now, before in pairs)
    if not hasattr(loop.scheduler, "sigmas"):  # whose sigmas are on the host
        assert counts["step"] <= plain_steps
