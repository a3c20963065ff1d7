"""A pipeline's life: others made of its parts, copies, saving, calls by hand, training."""

import copy
import io

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

from tests.pipelines import CASES, run
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import (
    AdaCorrection,
    Auto,
    Fb,
    cache_summary,
    enable_cache,
    is_cache_enabled,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.api import site_of

STEPS = 10
CASE = CASES["flux"]
METHODS = [Auto(tolerance=0.05), Fb(threshold=0.5)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def cached(method):
    """A cached pipeline after its first run, and what that gave."""
    pipe = enable_cache(CASE.build(), method)
    return pipe, run(CASE, pipe, steps=STEPS)


@pytest.fixture(scope="module")
def plain():
    return run(CASE, CASE.build(), steps=STEPS)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@each_method
def test_another_pipeline_of_its_parts_with_an_own_scheduler_is_plain(method, plain):
    pipe, expected = cached(method)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = quiet(FluxPipeline(**{**pipe.components, "scheduler": scheduler}))
    for _ in range(2):
        assert torch.equal(run(CASE, other, steps=STEPS), plain)
        assert torch.equal(run(CASE, pipe, steps=STEPS), expected)


@each_method
def test_a_pipeline_made_from_pipe_shares_the_cache(method):
    """It has the same transformer and the same scheduler."""
    case = CASES["flux-img2img-true-cfg"]
    pipe, expected = cached(method)
    other = quiet(FluxImg2ImgPipeline.from_pipe(pipe))
    wanted = run(case, enable_cache(case.build(), method), steps=STEPS)
    assert torch.equal(run(case, other, steps=STEPS), wanted)
    assert torch.equal(run(CASE, pipe, steps=STEPS), expected)


@each_method
def test_a_deep_copy_of_a_pipeline_is_plain(method, plain):
    pipe, expected = cached(method)
    copied = copy.deepcopy(pipe)
    assert not is_cache_enabled(copied) and is_cache_enabled(pipe)
    assert torch.equal(run(CASE, copied, steps=STEPS), plain)
    assert torch.equal(run(CASE, pipe, steps=STEPS), expected)
    wanted = run(CASE, enable_cache(copied, method), steps=STEPS)
    assert torch.equal(wanted, expected), "a copy may have a cache of its own"


@each_method
def test_a_model_called_by_hand_between_runs_is_plain(method):
    pipe, expected = cached(method)
    x = torch.ones(1, 4, 16)
    arguments = {
        "hidden_states": x,
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.ones(1, 3, pipe.transformer.config.joint_attention_dim),
        "pooled_projections": torch.ones(1, pipe.transformer.config.pooled_projection_dim),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    by_hand = [pipe.transformer(**arguments)[0] for _ in range(3)]
    wanted = CASE.build().transformer(**arguments)[0]
    assert all(torch.equal(output, wanted) for output in by_hand)
    assert torch.equal(run(CASE, pipe, steps=STEPS), expected)


@each_method
def test_a_saved_model_is_plain(method, tmp_path):
    model = make_tiny_flux()
    enable_cache(model, method, scheduler=FluxSampler(model).scheduler)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not is_cache_enabled(loaded) and type(loaded) is type(make_tiny_flux())
    assert type(loaded.transformer_blocks[0]) is FluxTransformerBlock
    model.save_pretrained(tmp_path)
    again = type(make_tiny_flux()).from_pretrained(tmp_path)
    for other in (loaded, again):
        values = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in values)
    assert is_cache_enabled(model)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    "method", [*METHODS, Fb(threshold=0.5, correction=AdaCorrection())], ids=lambda each: each.name
)
def test_gradients_under_checkpointing_are_those_without_a_cache(method, bare):
    def gradients(cached):
        model = make_tiny_flux()
        model.enable_gradient_checkpointing()
        model.train()
        sampler = FluxSampler(model)
        if cached:
            enable_cache(model, method, scheduler=None if bare else sampler.scheduler)
        with torch.enable_grad():
            sampler.run(4, finish=False).square().mean().backward()
        return model.x_embedder.weight.grad

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    "method", [*METHODS, Fb(threshold=0.5, correction=AdaCorrection())], ids=lambda each: each.name
)
@pytest.mark.parametrize("at", [1, 2])
def test_a_reset_while_the_model_runs_ends_the_run(method, at):
    sampler = FluxSampler(make_tiny_flux())
    model = sampler.transformer
    enable_cache(model, method, scheduler=sampler.scheduler)
    expected = sampler.run(STEPS, finish=False)
    calls = []

    def reset(module, args):
        calls.append(1)
        if len(calls) == at:
            reset_cache(model)

    handle = model.register_forward_pre_hook(reset)
    assert sampler.run(STEPS, finish=False).isfinite().all()
    handle.remove()
    assert len(calls) >= at and not site_of(model).tracker.latest.slots
    assert torch.equal(sampler.run(STEPS, finish=False), expected)


@each_method
def test_a_summary_is_a_few_lines(method):
    pipe, _ = cached(method)
    summary = cache_summary(pipe)
    for text in (str(summary), repr(summary)):
        assert len(text) < 400 and len(text.splitlines()) <= 3 and method.name in text
    computed, calls = summary.computed_calls, summary.calls
    assert f"{computed} of {calls} calls" in str(summary) and calls == STEPS
