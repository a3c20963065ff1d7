"""Every model family under every method: exactness, formulas written out, state, recognition."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

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
    BlockList,
    CacheConfig,
    apply_cache_on_transformer,
    cache_summary,
    disable_cache,
    enable_cache,
    is_cache_enabled,
    load_family_config,
    reset_cache,
)
from xfuser_adacorr.model_executor.cache.blocks import block_stack
from xfuser_adacorr.model_executor.cache.diffusers_adapters import registry
from xfuser_adacorr.model_executor.cache.diffusers_adapters.opensora import OPENSORA
from xfuser_adacorr.model_executor.cache.engine import engine_of

STEPS = 8
ROOT = Path(__file__).parents[1]
each_family = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
each_method = pytest.mark.parametrize("name", NAMES)


def refreshed(model):
    return [call.refreshed for call in cache_summary(model).trace.calls]


# -- what every family must do under every method ------------------------------------------------


@each_family
@each_method
def test_a_cache_that_never_hits_is_bit_equal(tiny, name):
    sampler = cached(tiny, never(name))
    x = sampler.run(STEPS)
    assert cache_summary(sampler.model).compute_fraction == 1.0
    assert torch.equal(x, FamilySampler(tiny).run(STEPS))


@each_family
@each_method
def test_hits_save_counted_compute(tiny, name):
    """All calls but the forced ones are hits; Fb computes its first block in them."""
    sampler = cached(tiny, loose(name))
    x = sampler.run(STEPS)
    forced_last = 2 if "Ada" in name or name == "Auto" else 0 if name == "Fb" else 1
    computed = [i == 0 or i >= STEPS - forced_last for i in range(STEPS)]
    assert refreshed(sampler.model) == computed
    fractions = [call.compute_fraction for call in cache_summary(sampler.model).trace.calls]
    if name.startswith("Fb"):
        hits = {f for f, full in zip(fractions, computed, strict=True) if not full}
        assert len(hits) == 1 and 0.0 < hits.pop() < 0.5
    else:
        assert fractions == [float(full) for full in computed]
    assert not torch.equal(x, FamilySampler(tiny).run(STEPS))
    assert x.isfinite().all()


@each_family
@each_method
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
    stack = block_stack(model, registry.find_family(model))
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

    expected = FamilySampler(tiny).run(STEPS, velocity=velocity)
    sampler = cached(tiny, CacheConfig(use_cache="Fb", rel_l1_thresh=threshold))
    x = sampler.run(STEPS)
    assert refreshed(sampler.model) == computed
    assert 1 <= sum(computed) < STEPS
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

    expected = FamilySampler(tiny).run(STEPS, velocity=velocity)
    sampler = cached(tiny, CacheConfig(use_cache="Tea", rel_l1_thresh=threshold))
    x = sampler.run(STEPS)
    assert refreshed(sampler.model) == computed
    assert 2 <= sum(computed) < STEPS
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@each_family
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


@each_family
@each_method
def test_a_guided_batch_shares_one_decision(tiny, name):
    sampler = cached(tiny, loose(name))
    sampler.run(STEPS, batch=2)
    calls = cache_summary(sampler.model).trace.calls
    assert [call.step_index for call in calls] == list(range(STEPS))
    assert {call.context for call in calls} == {"default"}


@each_family
@pytest.mark.parametrize("name", ["Fb", "Auto"])
def test_another_shape_begins_a_new_generation(tiny, name):
    """Even one of as many values: portrait and landscape share nothing."""
    sampler = cached(tiny, loose(name))
    sampler.run(STEPS, stop_after=4)
    x = sampler.run(STEPS, shape=tiny.other_shape)
    assert torch.equal(x, cached(tiny, loose(name)).run(STEPS, shape=tiny.other_shape))

    model = cached(tiny, loose(name), scheduler=None).model
    for shape in (tiny.shape, tiny.other_shape):
        noise = FamilySampler(tiny, model).noise(shape=shape)
        model(**tiny.inputs(noise, 900.0))
        assert [call.reason for call in cache_summary(model).trace.calls] == ["first"]


@each_family
@pytest.mark.parametrize("name", ["Tea", "Auto"])
def test_bare_models_find_their_place_by_their_timesteps(tiny, name):
    """Whatever the timestep at pure noise is, the noise level is in 0..1; runs are told apart."""
    sampler = cached(tiny, loose(name), scheduler=None)
    first = sampler.run(STEPS)
    calls = cache_summary(sampler.model).trace.calls
    assert calls[0].sigma == pytest.approx(1.0) and calls[-1].sigma < 0.2
    assert any(not call.refreshed for call in calls)
    assert torch.equal(sampler.run(STEPS), first)
    assert len(cache_summary(sampler.model).trace.calls) == STEPS


@each_family
def test_enabling_twice_raises(tiny):
    model = tiny.make()
    assert apply_cache_on_transformer(model, use_cache="Tea", num_steps=4) is model
    with pytest.raises(ValueError, match="already enabled"):
        enable_cache(model, "Fb")


@each_family
def test_reset_ends_the_generation(tiny):
    sampler = cached(tiny, loose("Fb"))
    sampler.run(STEPS, stop_after=3)
    reset_cache(sampler.model)
    assert engine_of(sampler.model).generation is None
    assert torch.equal(sampler.run(STEPS), cached(tiny, loose("Fb")).run(STEPS))


@each_family
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
        results.append(sampler.run(STEPS))
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


@pytest.mark.parametrize("family", ["pixart", "dit", "opensora", "opensora-original"])
def test_latents_become_tokens_without_a_copy(family):
    tiny = BY_NAME[family]
    latents = FamilySampler(tiny).noise()
    tokens = registry.find_family(tiny.make()).latent_tokens(latents)
    assert tokens.shape == (2, latents[0, 0].numel(), 4)
    assert tokens.data_ptr() == latents.data_ptr()
    assert torch.equal(tokens[1, -1], latents[(1, slice(None), *[-1] * (latents.ndim - 2))])


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
    expected = FamilySampler(tiny).run(STEPS, velocity=velocity)
    config = CacheConfig(
        use_cache="Fast", rel_l1_thresh=0.0, static_tokens=True, motion_threshold=tau
    )
    sampler = cached(tiny, config)
    x = sampler.run(STEPS)
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


# -- recognition and descriptions ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiny", "family"), [(tiny, tiny.name.removesuffix("-masked")) for tiny in FAMILIES]
)
def test_families_are_recognised(tiny, family):
    assert registry.find_family(tiny.make()).name == family


def test_an_unknown_class_is_told_all_families():
    with pytest.raises(ValueError, match="no cache adapter for transformer Linear") as error:
        enable_cache(nn.Linear(2, 2), "Fb")
    for name in (
        "DiTTransformer2DModel",
        "FluxTransformer2DModel",
        "MMDiTModel",
        "PixArtTransformer2DModel",
        "STDiT3",
        "STDiT3Transformer3DModel",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize("family", ["opensora-original", "opensora2"])
def test_a_similar_structure_that_is_called_otherwise_is_not_taken(family):
    class Other(nn.Module):
        def forward(self, latents, time, text):
            return latents

    model = BY_NAME[family].make()
    model.__dict__.pop("forward", None)
    model.__class__ = Other
    with pytest.raises(ValueError, match="no cache adapter for transformer Other"):
        enable_cache(model, "Fb")


@pytest.mark.parametrize("family", ["pixart", "dit", "opensora"])
def test_the_shipped_configuration_states_the_familys_defaults(family):
    known = registry.family_named(family)
    configs = load_family_config(ROOT / "configs" / f"{family}.yaml")
    assert set(NAMES) <= set(configs)
    for name, config in configs.items():
        assert config.rel_l1_thresh == known.thresholds.get(config.use_cache)
        if name == "Auto":
            assert config.adacorr_tolerance == known.tolerance
        elif config.enable_adacorrection:
            assert config.adacorr_tolerance == known.safety_tolerance


def test_tea_uses_the_published_polynomial_for_open_sora_1_2_only():
    released = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "in_channels": 4}
    polynomial = OPENSORA.published_polynomial(released)
    by_hand = 217.546007e-4 - 118.329252e-3 + 26.8662585e-2 - 0.0459364272e-1 + 0.048442624
    assert polynomial(0.1) == pytest.approx(by_hand) == pytest.approx(0.216, abs=5e-4)
    assert OPENSORA.published_polynomial({**released, "in_channels": 16}) is None
    for tiny in FAMILIES:
        model = tiny.make()
        enable_cache(model, "Tea")
        assert engine_of(model).method.polynomial(0.37) == pytest.approx(0.37)


def test_tea_reads_the_options_of_a_model_with_a_config_object():
    model = BY_NAME["opensora-original"].make()
    vars(model.config).update(depth=28, hidden_size=1152, num_heads=16, in_channels=4)
    enable_cache(model, "Tea")
    assert engine_of(model).method.polynomial(0.1) == pytest.approx(0.216, abs=5e-4)


def described(**changes):
    stream = ("x",)
    options = {
        "name": "mine",
        "transformer_class": "Mine",
        "block_lists": (BlockList(attribute="blocks", streams=stream, returns=stream),),
        "latents": "x",
        "timestep": "t",
        "output_stream": "x",
        "modulated_input": lambda block, arguments: arguments["x"],
    }
    return registry.ModelFamily(**{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_lists": ()}, "block_lists of family 'mine' must not be empty"),
        ({"output_stream": "y"}, "streams of blocks in family 'mine' must contain"),
        (
            {"block_lists": (BlockList(attribute="b", streams=("x",), returns=("y",)),)},
            "returns of b in family 'mine' must contain",
        ),
        (
            {
                "block_lists": (
                    BlockList(attribute="b", streams=("x",), returns=("x",), interleaved=True),
                )
            },
            "the first list must be neither interleaved nor joint",
        ),
    ],
)
def test_contradictory_descriptions_are_rejected(changes, named):
    with pytest.raises(ValueError, match=named):
        described(**changes)


def test_interleaved_lists_of_unequal_length_are_rejected():
    model = BY_NAME["opensora"].make()
    model.temporal_blocks.append(copy.deepcopy(model.temporal_blocks[0]))
    message = "equally many, got {'spatial_blocks': 2, 'temporal_blocks': 3}"
    with pytest.raises(ValueError, match=message):
        enable_cache(model, "Fb")


def test_a_family_without_a_default_asks_for_the_threshold(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity()])

    registry.register_family(described())
    with pytest.raises(ValueError, match="rel_l1_thresh must be given: family 'mine'"):
        enable_cache(Mine(), "Fb")


def test_a_family_registered_by_hand_replaces_a_built_in_one(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})
    mine = registry.register_family(described(transformer_class="PixArtTransformer2DModel"))
    assert registry.find_family(BY_NAME["pixart"].make()) is mine


@pytest.mark.parametrize("module", ["flux", "pixart", "dit", "opensora", "opensora2"])
def test_every_familys_module_offers_the_entry_point(module):
    from importlib import import_module

    adapter = import_module(f"{registry.__package__}.{module}")
    assert adapter.apply_cache_on_transformer is apply_cache_on_transformer


@each_family
def test_calibrations_are_bound_to_the_weights(tiny):
    from xfuser_adacorr.model_executor.cache.calibration import model_fingerprint

    assert model_fingerprint(tiny.make()) == model_fingerprint(tiny.make().bfloat16())
    assert model_fingerprint(tiny.make()) != model_fingerprint(tiny.make(seed=1))


@each_family
def test_maps_are_fitted_for_every_block_and_stream(tiny):
    from xfuser_adacorr.model_executor.cache.fitting import FastRecorder, TeaRecorder

    sampler = FamilySampler(tiny)
    family, fast, tea = registry.find_family(sampler.model), FastRecorder(), TeaRecorder()
    with fast.attached(sampler.model, family), tea.attached(sampler.model, family):
        sampler.run(STEPS)
    streams = {name for each in family.block_lists for name in each.streams}
    units = {f"blocks.{i}.{s}" for i in range(len(tiny.blocks(sampler.model))) for s in streams}
    assert set(fast.fits) == units | {f"stack.{family.output_stream}"}
    assert len(tea.changes) == STEPS - 1
