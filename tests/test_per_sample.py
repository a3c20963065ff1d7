"""Samples of a batch decided one by one: each as if it were alone, in one smaller batch a call."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tests.batches import BY_CASE, CASES, SCALES, BatchLoop
from tests.samplers import SCHEDULERS
from tests.test_synchronisation import host_reads  # noqa: F401 (a fixture)
from tests.tiny import make_tiny_flux
from xfuser_adacorr import (
    CacheConfig,
    apply_cache_on_transformer,
    cache_summary,
    disable_cache,
    enable_cache,
    load_config,
    register_family,
    reset_cache,
)
from xfuser_adacorr.core.batch import chosen_rows, joined_rows, repeats, sample_rows
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.model_executor.cache.context import Trace
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family as registry
from xfuser_adacorr.model_executor.cache.engine import engine_of
from xfuser_adacorr.model_executor.cache.intercept import handler_of
from xfuser_adacorr.model_executor.cache.per_sample import chosen_arguments
from xfuser_adacorr.model_executor.cache.xfuser_adapters.scope import check_config

SAMPLES = range(len(SCALES))
PER_SAMPLE = CacheConfig(use_cache="Auto", per_sample=True)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def decisions(summary, sample=None):
    return [
        (call.context, call.step_index, call.reason)
        for call in summary.trace.calls
        if call.sample == sample
    ]


def assert_each_as_alone(loop, make_config, **options):
    """Returns the decisions of every sample."""
    x, together = loop.cached(SAMPLES, make_config(per_sample=True), **options)
    for sample in SAMPLES:
        alone, summary = loop.cached([sample], make_config(), **options)
        assert decisions(together, sample) == decisions(summary)
        assert together.compute_by_sample[sample] == pytest.approx(summary.compute_fraction)
        bound = 1e-5 * float(alone.abs().max())  # sums of float32 in another order
        torch.testing.assert_close(x[sample], alone[0], rtol=1e-5, atol=bound)
    assert len(together.trace.calls) == sum(len(decisions(together, i)) for i in SAMPLES)
    return [decisions(together, sample) for sample in SAMPLES]


# -- the same as alone -----------------------------------------------------------------------------


@each_case
def test_each_sample_is_sampled_as_if_it_were_alone(case):
    outcomes = assert_each_as_alone(BatchLoop(case), case.config)
    assert len({tuple(outcome) for outcome in outcomes}) > 1
    assert all(any(reason == "reuse" for *_, reason in outcome) for outcome in outcomes)


@pytest.mark.parametrize("name", ["flux", "flux-dpm", "pixart-dpm"])
def test_each_sample_has_a_budget_of_its_own(name):
    case = BY_CASE[name]
    steps = 20
    outcomes = assert_each_as_alone(
        BatchLoop(case), lambda **o: case.config(target_compute=0.35, **o), steps=steps
    )
    for outcome in outcomes:
        assert sum(reason != "reuse" for *_, reason in outcome) == round(0.35 * steps)


@pytest.mark.parametrize("name", ["flux", "opensora"])
def test_a_bare_transformer_decides_alike(name):
    """Places are read from the timesteps, and runs begin unannounced."""
    case = BY_CASE[name]
    loop = BatchLoop(case)
    alone = []
    for sample in SAMPLES:
        enable_cache(loop.model, case.config())
        alone.append((loop.run([sample])[0], cache_summary(loop.model)))
        disable_cache(loop.model)
    enable_cache(loop.model, case.config(per_sample=True))
    for _ in range(2):
        x, together = loop.run(SAMPLES), cache_summary(loop.model)
        for sample, (expected, summary) in enumerate(alone):
            assert decisions(together, sample) == decisions(summary)
            torch.testing.assert_close(x[sample], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["flux-dpm", "flux-true-cfg-unipc", "dit-ddim"])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_callback_adds_to_one_sample_survives(name, in_place):
    def callback(i, x, indices):
        if i not in (2, 3, 4, 6):
            return x
        change = torch.tensor([0.3 * (sample == 1) for sample in indices])
        change = change.view(-1, *[1] * (x.ndim - 1))
        return x.add_(change) if in_place else x + change

    case = BY_CASE[name]
    assert_each_as_alone(BatchLoop(case), case.config, callback=callback)


@pytest.mark.parametrize("name", ["dpm-single", "dpm-3-flow", "unipc", "deis", "euler", "pndm"])
def test_every_sampler_is_replayed_for_each_sample(name):
    case = replace(BY_CASE["flux-dpm"], make_scheduler=SCHEDULERS[name], tolerance=0.3)
    outcomes = assert_each_as_alone(BatchLoop(case), case.config)
    assert all(any(reason == "reuse" for *_, reason in outcome) for outcome in outcomes)


def test_replay_works_in_inference_mode():
    case = BY_CASE["flux-dpm"]
    with torch.inference_mode():
        assert_each_as_alone(BatchLoop(case), case.config)


def test_forgetting_in_the_middle_of_a_run():
    """The sampler's state is that of the whole batch, whenever it is looked at."""
    case = BY_CASE["flux-true-cfg-unipc"]
    loop = BatchLoop(case)

    def callback(i, x, indices):
        if i == 7:
            shapes = {m.shape for m in loop.scheduler.model_outputs if m is not None}
            assert shapes == {x.shape}
            reset_cache(loop.model)
            assert handler_of(loop.scheduler) is None
        return x

    assert_each_as_alone(loop, case.config, callback=callback)


# -- what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "pixart-dpm"])
def test_the_transformer_sees_the_refreshed_rows_alone(name):
    case, counted = BY_CASE[name], []
    loop = BatchLoop(case)
    loop.model.proj_out.register_forward_pre_hook(lambda m, args: counted.append(len(args[0])))
    _, summary = loop.cached(SAMPLES, case.config(per_sample=True))
    copies = 2 if case.guidance == "batched" else 1
    refreshed = Counter(call.step_index for call in summary.trace.calls if call.refreshed)
    assert counted == [copies * refreshed[step] for step in sorted(refreshed)]
    assert len(set(counted)) > 1 and len(refreshed) < summary.num_steps
    total = copies * len(SAMPLES) * summary.num_steps
    assert summary.compute_fraction == pytest.approx(sum(counted) / total)
    assert summary.computed_steps + summary.reused_steps == len(SAMPLES) * summary.num_steps


@each_case
def test_refreshing_all_is_the_ordinary_call(case):
    loop = BatchLoop(case)
    plain = loop.run(SAMPLES)
    x, summary = loop.cached(SAMPLES, CacheConfig(adacorr_gamma=1e9, per_sample=True))
    rounding = 1e-6 if "unipc" in case.name else 0.0  # it sums up in another order for one row
    torch.testing.assert_close(x, plain, rtol=rounding, atol=rounding)
    assert summary.compute_fraction == 1.0


@pytest.mark.parametrize("name", ["flux", "flux-dpm", "dit-ddim"])
def test_at_most_one_read_a_call(name, host_reads):  # noqa: F811
    case = BY_CASE[name]
    loop = BatchLoop(case)
    counts, call = [], loop.call

    def counted(*args):
        before = len(host_reads)
        out = call(*args)
        counts.append(len(host_reads) - before)
        return out

    def reads_of_second_run(per_sample):
        enable_cache(loop.model, case.config(per_sample=per_sample), scheduler=loop.scheduler)
        loop.run(SAMPLES)
        counts.clear()
        loop.run(SAMPLES)
        disable_cache(loop.model)
        return list(counts)

    loop.call = counted
    loop.run(SAMPLES)
    plain = list(counts)
    each, together = reads_of_second_run(True), reads_of_second_run(False)
    # the schedule, and what the last run left unread: nothing, if its last call was spared
    assert abs(each[0] - together[0]) <= 1
    assert all(now - before <= 1 for now, before in zip(each[1:], plain[1:], strict=True))


def test_memory_is_that_of_the_samples_alone():
    """Measured where one is refreshed; the others keep two weights for each of 4 reused calls."""
    case = BY_CASE["flux"]
    loop = BatchLoop(case)
    _, together = loop.cached(SAMPLES, case.config(per_sample=True))
    alone = [loop.cached([i], case.config())[1].cache_memory_bytes for i in SAMPLES]
    assert 0 <= together.cache_memory_bytes - sum(alone) <= (len(SAMPLES) - 1) * 4 * 2 * 4


def test_memory_of_replayed_samples_counts_their_samplers():
    """Each keeps a sampler's state of its own, two outputs, and the latents that it carries."""
    case = BY_CASE["flux-dpm"]
    loop = BatchLoop(case)
    _, together = loop.cached(SAMPLES, case.config(per_sample=True))
    alone = [loop.cached([i], case.config())[1].cache_memory_bytes for i in SAMPLES]
    latents = loop.noise[:1].nbytes
    assert 0 < together.cache_memory_bytes - sum(alone) <= len(SAMPLES) * (3 * latents + 16)


# -- which rows are whose --------------------------------------------------------------------------


def test_rows_of_a_guided_batch():
    x = torch.arange(6)[:, None]  # two copies of three samples
    assert [sample_rows(x, 3, i).flatten().tolist() for i in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert chosen_rows(x, 3, [2, 0]).flatten().tolist() == [2, 0, 5, 3]
    assert torch.equal(joined_rows([sample_rows(x, 3, i) for i in range(3)]), x)
    assert repeats(torch.tensor([1, 2, 1, 2]), 2) and not repeats(torch.tensor([1, 2, 1, 3]), 2)
    assert repeats(torch.tensor([1, 2] * 3), 3) and not repeats(torch.tensor([1, 2, 1, 2, 2, 2]), 3)


def test_arguments_are_cut_down_as_the_family_describes():
    flux, pixart = registry.family_named("flux"), registry.family_named("pixart")
    x = torch.arange(4.0)[:, None]
    given = {
        "hidden_states": x,
        "timestep": torch.tensor(0.5),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(4, 3),
        "controlnet_block_samples": [x, 2 * x],
        "return_dict": False,
    }
    chosen = chosen_arguments(flux, given, 4, [1, 3])
    assert chosen["hidden_states"].flatten().tolist() == [1, 3]
    assert [part.flatten().tolist() for part in chosen["controlnet_block_samples"]] == [
        [1, 3],
        [2, 6],
    ]
    same = ("timestep", "guidance", "img_ids", "return_dict")
    assert all(chosen[name] is given[name] for name in same)
    guided = {"hidden_states": x, "added_cond_kwargs": {"resolution": x, "aspect_ratio": None}}
    chosen = chosen_arguments(pixart, guided, 2, [1])
    assert chosen["added_cond_kwargs"]["resolution"].flatten().tolist() == [1, 3]
    shared_by_halves = {"hidden_states": x, "encoder_attention_mask": x[:2]}
    chosen = chosen_arguments(pixart, shared_by_halves, 2, [1])
    assert chosen["encoder_attention_mask"].flatten().tolist() == [1]
    with pytest.raises(ValueError, match=r"added_cond_kwargs\['resolution'\] must have 1, 2 or 4"):
        chosen_arguments(pixart, {**guided, "added_cond_kwargs": {"resolution": x[:3]}}, 2, [1])


def test_tensors_that_are_not_described_are_refused():
    case = BY_CASE["flux"]
    loop = BatchLoop(case)
    case.shared["joint_attention_kwargs"] = {"scale": 1.0}
    try:
        loop.cached(SAMPLES, case.config(per_sample=True))
        case.shared["joint_attention_kwargs"] = {"ip_hidden_states": [torch.zeros(3, 4, 16)]}
        with pytest.raises(ValueError, match="whether joint_attention_kwargs has a row for each"):
            loop.cached(SAMPLES, case.config(per_sample=True))
    finally:
        del case.shared["joint_attention_kwargs"]
    assert engine_of(loop.model).generation is None


def test_a_scheduler_with_other_samples_is_refused():
    case = BY_CASE["flux-dpm"]
    loop = BatchLoop(case)
    enable_cache(loop.model, case.config(per_sample=True), scheduler=loop.scheduler)
    loop.scheduler.set_timesteps(6)
    t = loop.scheduler.timesteps[0]
    out = loop.guided(loop.noise, t, list(SAMPLES))
    with pytest.raises(ValueError, match="given 3 samples, but the scheduler 2 rows"):
        loop.scheduler.step(out[:2], t, loop.noise[:2])


def test_samples_of_two_branches_must_be_the_same():
    case = BY_CASE["flux-true-cfg"]
    loop = BatchLoop(case)
    enable_cache(loop.model, case.config(per_sample=True), scheduler=loop.scheduler)
    loop.scheduler.set_timesteps(6)
    t = loop.scheduler.timesteps[0]
    own = {name: x[:2] for name, x in case.conditions.items()}
    with loop.model.cache_context("cond"):
        loop.call(loop.noise, t, case.conditions)
    with (
        loop.model.cache_context("uncond"),
        pytest.raises(ValueError, match="every branch must hold the same samples; 'uncond' has 2"),
    ):
        loop.call(loop.noise[:2], t, own)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux-dpm", "dit-ddim"])
def test_runs_leave_nothing_behind(name):
    loop = BatchLoop(BY_CASE[name])
    config, plain = loop.case.config(per_sample=True), loop.run(SAMPLES)
    scheduler_class, attributes = type(loop.scheduler), set(vars(loop.scheduler))
    enable_cache(loop.model, config, scheduler=loop.scheduler)
    expected = loop.run(SAMPLES)
    loop.run(SAMPLES, stop_after=5)
    assert torch.equal(loop.run(SAMPLES), expected)
    pair = loop.run([0, 1], stop_after=6)  # a batch of another size begins anew
    assert set(cache_summary(loop.model).compute_by_sample) == {0, 1}
    torch.testing.assert_close(pair, loop.run(SAMPLES, stop_after=6)[:2], rtol=1e-4, atol=1e-4)

    failing = loop.model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        loop.run(SAMPLES)
    failing.remove()
    assert engine_of(loop.model).generation is None and handler_of(loop.scheduler) is None
    assert torch.equal(loop.run(SAMPLES), expected)
    loop.run(SAMPLES, stop_after=5)
    disable_cache(loop.model)
    assert type(loop.scheduler) is scheduler_class and set(vars(loop.scheduler)) == attributes
    assert torch.equal(loop.run(SAMPLES), plain)


def test_a_batch_may_change_its_size_within_a_run():
    """As a pipeline that ends guidance early; under a sampler that is replayed."""
    case = BY_CASE["flux-dpm"]
    loop = BatchLoop(case)
    enable_cache(loop.model, case.config(per_sample=True), scheduler=loop.scheduler)
    loop.scheduler.set_timesteps(10)
    x, rows = loop.noise, list(SAMPLES)
    for i, t in enumerate(loop.scheduler.timesteps):
        if i == 6:
            x, rows = x[:2], rows[:2]
            keep = loop.scheduler.model_outputs
            loop.scheduler.model_outputs = [m[:2] for m in keep]
        x = loop.scheduler.step(loop.guided(x, t, rows), t, x, return_dict=False)[0]
    assert x.shape == (2, 16, 8) and x.isfinite().all()
    assert set(cache_summary(loop.model).compute_by_sample) == {0, 1}


def test_a_stochastic_step_is_left_to_the_sampler():
    """Noise is drawn for the whole batch at once, as without a cache."""
    case = replace(BY_CASE["dit-ddim"], guidance="none", steps_whole_batch=False)
    loop = BatchLoop(case)
    enable_cache(
        loop.model, CacheConfig(adacorr_gamma=1e9, per_sample=True), scheduler=loop.scheduler
    )
    results = []
    for cached in (True, False):
        loop.scheduler.set_timesteps(5)
        x, generator = loop.noise, torch.Generator().manual_seed(2)
        for t in loop.scheduler.timesteps:
            out = loop.guided(x, t, list(SAMPLES))
            x = loop.scheduler.step(out, t, x, eta=1.0, generator=generator).prev_sample
        results.append(x)
        if cached:
            disable_cache(loop.model)
    assert torch.equal(*results)


def test_results_of_a_step_keep_their_form():
    case = BY_CASE["pixart-dpm"]
    loop = BatchLoop(case)
    enable_cache(loop.model, case.config(per_sample=True), scheduler=loop.scheduler)
    loop.scheduler.set_timesteps(6)
    t = loop.scheduler.timesteps[0]
    result = loop.scheduler.step(loop.guided(loop.noise, t, list(SAMPLES)), t, loop.noise)
    plain = DPMSolverMultistepScheduler.from_config(loop.scheduler.config)
    plain.set_timesteps(6)
    disable_cache(loop.model)
    expected = plain.step(loop.guided(loop.noise, t, list(SAMPLES)), t, loop.noise)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.prev_sample, expected.prev_sample)


# -- traces ----------------------------------------------------------------------------------------


def test_the_trace_tells_the_samples_apart(tmp_path):
    case = BY_CASE["flux-true-cfg"]
    loop = BatchLoop(case)
    _, summary = loop.cached(SAMPLES, case.config(per_sample=True))
    summary.trace.save(tmp_path / "trace.json")
    loaded = Trace.load(tmp_path / "trace.json")
    assert loaded == summary.trace
    assert [(call.context, call.sample) for call in loaded.calls[:6]] == [
        (context, sample) for context in ("cond", "uncond") for sample in SAMPLES
    ]
    shares = summary.compute_by_sample
    assert summary.compute_fraction == pytest.approx(sum(shares.values()) / len(SAMPLES))
    with pytest.raises(ValueError, match="decided one by one"):
        enable_cache(loop.model, "Replay", trace=loaded)


def test_traces_of_schema_2_load():
    call = {
        "context": "cond", "step_index": 0, "sigma": 1.0, "refreshed": True, "reason": "first"
    }  # fmt: skip
    trace = Trace.from_dict({"schema": 2, "method": "Auto", "calls": [call], "config": {}})
    assert trace.calls[0].sample is None


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": "Fb"},
        {"use_cache": "Tea", "enable_adacorrection": True},
        {"use_cache": "Schedule", "schedule": 2, "enable_adacorrection": True},
        {"use_cache": "Auto", "adacorr_mode": "literal"},
    ],
)
def test_per_sample_is_an_option_of_auto(options):
    with pytest.raises(ValueError, match="per_sample is an option of Auto in adaptive mode"):
        CacheConfig(**options, per_sample=True)


def test_per_sample_must_be_a_flag():
    with pytest.raises(TypeError, match="per_sample must be True or False"):
        CacheConfig(per_sample=1)


def test_the_verbs_take_the_option(tmp_path):
    model = make_tiny_flux()
    enable_cache(model, "Auto", per_sample=True)
    assert engine_of(model).config == PER_SAMPLE
    disable_cache(model)
    apply_cache_on_transformer(model, use_cache="Auto", per_sample=True)
    assert engine_of(model).config == PER_SAMPLE
    file = tmp_path / "flux.yaml"
    file.write_text("family: flux\nmethods:\n  Auto: {per_sample: true}\n")
    assert load_config(file) == PER_SAMPLE


def test_a_family_that_does_not_describe_its_rows_is_refused(own_registry):
    family = own_registry.family_named("flux")
    register_family(replace(family, batch_arguments=()))
    with pytest.raises(ValueError, match="per_sample must be False for family 'flux'"):
        enable_cache(make_tiny_flux(), PER_SAMPLE)
    with pytest.raises(ValueError, match="batch_arguments of family 'flux' must contain"):
        replace(family, batch_arguments=("timestep",))


def test_split_latents_and_stages_are_refused():
    check_config(PER_SAMPLE, DecisionScope(), None)
    with pytest.raises(ValueError, match="per_sample must be False where ranks hold parts"):
        check_config(PER_SAMPLE, DecisionScope(latents_are_split=True), None)
    with pytest.raises(ValueError, match="per_sample must be False where ranks hold parts"):
        check_config(PER_SAMPLE, DecisionScope(), object())


def test_wrapped_schedulers_are_refused():
    class xFuserSchedulerBaseWrapper:
        module = SCHEDULERS["dpm-2-flow"]()

    with pytest.raises(ValueError, match="per_sample must be False under xfuser's wrappers"):
        enable_cache(make_tiny_flux(), PER_SAMPLE, scheduler=xFuserSchedulerBaseWrapper())
