"""Every model family under every method: exactness, formulas written out, state."""

import copy

import pytest
import torch

from tests.tiny_families import (
    BY_NAME,
    FAMILIES,
    NAMES,
    FamilySampler,
    PlainCall,
    cached,
    loose,
    never,
    sample_in,
)
from xfuser_adacorr import (
    CacheConfig,
    apply_cache_on_transformer,
    cache_summary,
    disable_cache,
    enable_cache,
    is_cache_enabled,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import find_family
from xfuser_adacorr.model_executor.cache.sites.blocks import block_stack

STEPS = 5
FORMULA_STEPS = 10
each_family = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
each_unmasked = pytest.mark.parametrize(
    "tiny", [tiny for tiny in FAMILIES if "masked" not in tiny.name], ids=lambda tiny: tiny.name
)


def every_third_method(families, first):
    """Of every family a third of the methods, of every method a third of the families."""
    pairs = [
        (tiny, name) for i, tiny in enumerate(families) for name in NAMES[(i + first) % 3 :: 3]
    ]
    ids = [f"{tiny.name}-{name}" for tiny, name in pairs]
    return pytest.mark.parametrize(("tiny", "name"), pairs, ids=ids)


def refreshed(model):
    return [call.refreshed for call in cache_summary(model).trace.calls]


# -- what every family must do under every method ------------------------------------------------


@every_third_method(FAMILIES, first=0)
def test_a_cache_that_never_hits_is_bit_equal(tiny, name):
    sampler = cached(tiny, never(name))
    x = sampler.run(STEPS)
    assert cache_summary(sampler.model).compute_fraction == 1.0
    assert torch.equal(x, FamilySampler(tiny).run(STEPS))


@every_third_method([tiny for tiny in FAMILIES if "masked" not in tiny.name], first=1)
def test_hits_save_counted_compute(tiny, name):
    """All calls but the forced ones are hits; Fb computes its first block in them."""
    sampler = cached(tiny, loose(name))
    x = sampler.run(STEPS)
    ada = name.startswith("Ada")
    forced_first, forced_last = (2, 2) if ada else (1, 0) if name == "Fb" else (1, 1)
    computed = [i < forced_first or i >= STEPS - forced_last for i in range(STEPS)]
    assert refreshed(sampler.model) == computed
    fractions = [call.compute_fraction for call in cache_summary(sampler.model).trace.calls]
    if name.startswith("Fb"):
        hits = {f for f, full in zip(fractions, computed, strict=True) if not full}
        assert len(hits) == 1 and 0.0 < hits.pop() < 0.5
    else:
        assert fractions == [float(full) for full in computed]
    assert not torch.equal(x, FamilySampler(tiny).run(STEPS))
    assert x.isfinite().all()


@each_unmasked
@pytest.mark.parametrize("name", ["Fast", "Auto", "Tea+AdaCorrection"])
def test_disabling_restores_the_model_bit_for_bit(tiny, name):
    sampler = FamilySampler(tiny)
    model, plain = sampler.model, sampler.run(STEPS)
    before = copy.deepcopy(model.state_dict())
    modules = {key: (type(m), set(m.__dict__), m.forward) for key, m in model.named_modules()}
    enable_cache(model, loose(name), scheduler=sampler.scheduler)
    assert is_cache_enabled(model) and list(model.state_dict()) == list(before)
    sampler.run(STEPS)
    disable_cache(model)
    assert not is_cache_enabled(model)
    for key, module in model.named_modules():
        assert (type(module), set(module.__dict__), module.forward) == modules[key]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(sampler.run(STEPS), plain)


@each_family
def test_the_engine_sees_the_blocks_in_the_order_they_run(tiny):
    model, order = tiny.make(), []
    for block in tiny.blocks(model):
        block.register_forward_hook(lambda block, *args: order.append(block))
    model(**tiny.inputs(FamilySampler(tiny, model).noise(), 500.0))
    stack = block_stack(model, find_family(model))
    assert [block for block, _ in stack] == order == tiny.blocks(model)


@each_family
def test_fb_hits_follow_the_formula(tiny):
    """A hit is B0(h) + R for the whole guided batch, decided once by the change of B0(h) - h."""
    plain, threshold, computed, memory = tiny.make(), 0.3, [], {}

    def velocity(inputs, index, last):
        call = PlainCall(tiny, plain, inputs)
        r = call.after_first - call.stack_input
        hit = index > 0 and (r - memory["r"]).abs().mean() / memory["r"].abs().mean() < threshold
        computed.append(not hit)
        if hit:
            return call.output_with(call.after_first + memory["residual"])
        memory.update(r=r, residual=call.stack_output - call.after_first)
        return call.output

    expected = FamilySampler(tiny).run(FORMULA_STEPS, velocity=velocity)
    sampler = cached(tiny, CacheConfig(use_cache="Fb", rel_l1_thresh=threshold))
    x = sampler.run(FORMULA_STEPS)
    assert refreshed(sampler.model) == computed
    assert 1 <= sum(computed) < FORMULA_STEPS
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@each_family
def test_tea_hits_follow_the_formula(tiny):
    """A hit is h + R; the signal is what really enters the first block's attention."""
    plain, threshold, computed, memory = tiny.make(), 0.3, [], {"a": 0.0}

    def velocity(inputs, index, last):
        call = PlainCall(tiny, plain, inputs)
        if index > 0:
            change = (call.signal - memory["f"]).abs().mean() / memory["f"].abs().mean()
            memory["a"] += float(change)
        memory["f"] = call.signal
        hit = 0 < index and not last and memory["a"] < threshold
        computed.append(not hit)
        if hit:
            return call.output_with(call.stack_input + memory["residual"])
        memory.update(a=0.0, residual=call.stack_output - call.stack_input)
        return call.output

    expected = FamilySampler(tiny).run(FORMULA_STEPS, velocity=velocity)
    sampler = cached(tiny, CacheConfig(use_cache="Tea", rel_l1_thresh=threshold))
    x = sampler.run(FORMULA_STEPS)
    assert refreshed(sampler.model) == computed
    assert 2 <= sum(computed) < FORMULA_STEPS
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@each_unmasked
def test_fast_replaces_the_blocks_by_their_last_residuals(tiny):
    """With all blocks replaced, a hit is h plus the sum of all residuals."""
    plain, memory = tiny.make(), {}

    def velocity(inputs, index, last):
        call = PlainCall(tiny, plain, inputs)
        if index == 0 or last:
            memory["residual"] = call.stack_output - call.stack_input
            return call.output
        return call.output_with(call.stack_input + memory["residual"])

    expected = FamilySampler(tiny).run(STEPS, velocity=velocity)
    x = cached(tiny, loose("Fast")).run(STEPS)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@each_unmasked
@pytest.mark.parametrize("name", ["Fb", "Auto", "Tea+AdaCorrection"])
def test_a_guided_batch_shares_one_decision(tiny, name):
    sampler = cached(tiny, loose(name))
    sampler.run(STEPS, batch=2)
    calls = cache_summary(sampler.model).trace.calls
    assert [call.step_index for call in calls] == list(range(STEPS))
    assert {call.context for call in calls} == {"default" if name == "Fb" else "step"}


@each_unmasked
@pytest.mark.parametrize("name", ["Fb", "Auto"])
def test_another_shape_begins_a_new_generation(tiny, name):
    """Even one of as many values: portrait and landscape share nothing."""
    sampler = cached(tiny, loose(name))
    sampler.run(STEPS, stop_after=3)
    x = sampler.run(STEPS, shape=tiny.other_shape)
    assert torch.equal(x, cached(tiny, loose(name)).run(STEPS, shape=tiny.other_shape))

    model = cached(tiny, loose(name), scheduler=None).model
    for shape in (tiny.shape, tiny.other_shape):
        noise = FamilySampler(tiny, model).noise(shape=shape)
        model(**tiny.inputs(noise, 900.0))
        assert [call.reason for call in cache_summary(model).trace.calls] == ["first"]


@each_unmasked
@pytest.mark.parametrize("name", ["Tea", "Auto"])
def test_bare_models_find_their_place_by_their_timesteps(tiny, name):
    """Whatever the timestep at pure noise is, the noise level is in 0..1; runs are told apart."""
    sampler = cached(tiny, loose(name), scheduler=None)
    first = sampler.run(STEPS)
    calls = cache_summary(sampler.model).trace.calls
    assert calls[0].sigma == pytest.approx(1.0) and calls[-1].sigma < 0.3
    assert any(not call.refreshed for call in calls)
    assert torch.equal(sampler.run(STEPS), first)
    assert len(cache_summary(sampler.model).trace.calls) == STEPS


@each_unmasked
def test_enabling_twice_raises(tiny):
    model = tiny.make()
    assert apply_cache_on_transformer(model, use_cache="Tea", num_steps=4) is model
    with pytest.raises(ValueError, match="already enabled"):
        enable_cache(model, "Fb")


@each_unmasked
def test_reset_ends_the_generation(tiny):
    sampler = cached(tiny, loose("Fb"))
    sampler.run(STEPS, stop_after=3)
    reset_cache(sampler.model)
    assert site_of(sampler.model).tracker.run is None
    assert torch.equal(sampler.run(STEPS), cached(tiny, loose("Fb")).run(STEPS))


@each_unmasked
@pytest.mark.parametrize("name", ["Fb", "Tea", "Auto"])
def test_reused_outputs_look_like_computed_ones(tiny, name):
    """Type, shape and dtype are those of the model's forward, for both kinds of call."""
    inputs = tiny.inputs(FamilySampler(tiny).noise(), 900.0)
    expected = tiny.make()(**inputs)
    model = cached(tiny, loose(name), scheduler=None).model
    for timestep in (900.0, 880.0):
        out = model(**tiny.inputs(FamilySampler(tiny).noise(), timestep))
        assert type(out) is type(expected)
        assert sample_in(out).shape == sample_in(expected).shape
        assert sample_in(out).dtype == sample_in(expected).dtype
    assert refreshed(model) == [True, False]


def test_a_reuse_keeps_the_dtype_of_a_float32_head():
    """STDiT3 returns float32 whatever its own dtype is."""
    tiny = BY_NAME["opensora"]
    model = tiny.make().to(torch.bfloat16)
    enable_cache(model, loose("Auto"))
    noise = FamilySampler(tiny, model).noise().bfloat16()
    outs = [model(**tiny.inputs(noise, t)).sample for t in (900.0, 880.0)]
    assert refreshed(model) == [True, False]
    assert [out.dtype for out in outs] == [torch.float32] * 2


# -- learned variances ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pixart", "dit", "opensora", "opensora-original"])
def test_offsets_are_measured_on_what_the_sampler_follows(family):
    """A learned variance a thousand times larger changes no decision, but is forecast too."""
    tiny, records, results, model = BY_NAME[family], [], [], None
    for factor in (1.0, 1000.0):
        model = tiny.make()
        head = {
            "pixart": lambda m: m.proj_out,
            "dit": lambda m: m.proj_out_2,
            "opensora": lambda m: m.final_layer.linear,
            "opensora-original": lambda m: m.final_layer,
        }[family](model)
        head.weight.unflatten(0, (-1, 8))[:, 4:] *= factor
        head.bias.unflatten(0, (-1, 8))[:, 4:] *= factor
        sampler = FamilySampler(tiny, model)
        config = CacheConfig(use_cache="Auto", adacorr_tolerance=0.2)
        enable_cache(model, config, scheduler=sampler.scheduler)
        results.append(sampler.run(FORMULA_STEPS))
        records.append(cache_summary(model).trace.calls)
    assert [c.reason for c in records[0]] == [c.reason for c in records[1]]
    found = [[c.found_offset for c in calls if c.found_offset is not None] for calls in records]
    assert found[0] and found[0] == pytest.approx(found[1], rel=1e-4)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    enable_cache(tiny_model := tiny.make(), loose("Auto"))
    noise = FamilySampler(tiny).noise()
    fresh, reused = (sample_in(tiny_model(**tiny.inputs(noise, t))) for t in (900.0, 880.0))
    assert torch.equal(reused, fresh), "the forecast from one refresh is its whole output"


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_static_tokens_bypass_the_blocks(family):
    """Moving tokens see only each other; static ones take the stack's last residual."""
    tiny, tau, memory = BY_NAME[family], 0.5, {"moving": []}
    plain = tiny.make()

    def kept(tokens, block, args, kwargs):
        return (args[0][:, tokens], *args[1:]), kwargs

    def velocity(inputs, index, last):
        call = PlainCall(tiny, plain, inputs)
        if index == 0 or last:
            memory.update(seen=call.stack_input.clone(), r=call.stack_output - call.stack_input)
            return call.output
        motion = (call.stack_input - memory["seen"]).square().sum(-1).amax(0)
        moving = (motion > tau * motion.max()).nonzero()[:, 0]
        memory["moving"].append(len(moving))
        part = call.stack_input[:, moving]
        for block, (args, kwargs) in memory["calls"](inputs):
            part = block(part, *args[1:], **kwargs)
        whole = call.stack_input + memory["r"]
        whole[:, moving] = part
        memory["seen"][:, moving] = call.stack_input[:, moving]
        return call.output_with(whole)

    def block_calls(inputs):
        """Blocks with the arguments of a plain call."""
        calls, handles = [], []
        for block in tiny.blocks(plain):
            handles.append(
                block.register_forward_pre_hook(
                    lambda block, args, kwargs: calls.append((block, (args, kwargs))),
                    with_kwargs=True,
                )
            )
        plain(**inputs)
        for handle in handles:
            handle.remove()
        return calls

    memory["calls"] = block_calls
    expected = FamilySampler(tiny).run(FORMULA_STEPS, velocity=velocity)
    config = CacheConfig(
        use_cache="Fast", rel_l1_thresh=0.0, static_tokens=True, motion_threshold=tau
    )
    sampler = cached(tiny, config)
    x = sampler.run(FORMULA_STEPS)
    assert min(memory["moving"]) < 16
    assert cache_summary(sampler.model).compute_fraction < 1.0
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opensora", "opensora-original", "opensora2"])
@pytest.mark.parametrize("name", ["Fast", "Fast+AdaCorrection"])
def test_static_tokens_are_refused_where_blocks_need_all_tokens(family, name):
    model = BY_NAME[family].make()
    with pytest.raises(ValueError, match=f"static_tokens must be False for {type(model).__name__}"):
        enable_cache(model, name, static_tokens=True)
    assert not is_cache_enabled(model)
