"""Families that are inferred: the stack methods on tiny models of diffusers' transformers."""

from dataclasses import replace
from itertools import product

import diffusers
import pytest
import torch
from torch import nn

from tests.stack_runs import METHODS, made, problem
from tests.tiny import make_tiny_flux
from tests.tiny_models import MODELS, UNTOLD
from xfuser_adacorr import enable_cache
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family as registry
from xfuser_adacorr.model_executor.cache.diffusers_adapters.attention_input import attention_input
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import BlockList, ModelFamily
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import (
    full_noise_timestep,
    infer_family,
    resolve_returns,
)
from xfuser_adacorr.model_executor.cache.sites.blocks import BlockRunner, StreamLayout


@pytest.mark.parametrize(("name", "method"), product(MODELS, METHODS))
def test_a_stack_method_runs_on_an_inferred_family(name, method, own_registry):
    assert problem(name, method) is None


# -- what is inferred -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "DiTTransformer2DModel"])
def test_what_is_inferred_is_what_is_described_by_hand(name):
    model = MODELS[name].make()
    inferred, by_hand = infer_family(model), registry.find_family(model)
    assert by_hand.name != name == inferred.name
    for field in ("latents", "timestep", "output_stream", "full_noise_timestep"):
        assert getattr(inferred, field) == getattr(by_hand, field)
    assert resolved(name) == [
        (each.attribute, each.returns, each.joint) for each in by_hand.block_lists
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SD3Transformer2DModel", 1000.0),
        ("WanTransformer3DModel", 1000.0),
        ("LTXVideoTransformer3DModel", 1000.0),
        ("Flux2Transformer2DModel", 1.0),  # its forward multiplies by 1000
        ("QwenImageTransformer2DModel", 1.0),  # its embedding of timesteps does
        ("ZImageTransformer2DModel", 1.0),  # an attribute says so
    ],
)
def test_the_timestep_at_pure_noise_is_found(name, expected):
    assert full_noise_timestep(made(name)) == expected == MODELS[name].full_noise


HIDDEN, TEXT = "hidden_states", "encoder_hidden_states"


def resolved(name):
    """(attribute, returns, joint) of each list after one call, in the order of the lists."""
    model = MODELS[name].make()
    runner = run_once(MODELS[name], model, infer_family(model))
    return [(each.attribute, each.returns, each.joint) for each in runner.block_lists]


def run_once(tiny, model, family):
    """A runner that has seen one call of the model."""
    runner = BlockRunner(model, family)
    originals = [block.forward for block, _ in runner.stack]

    def taken_over(index):
        def forward(*args, **kwargs):
            call = runner.call(index, originals[index], args, kwargs)
            return runner.result(index, call.run())

        return forward

    for index, (block, _) in enumerate(runner.stack):
        block.__dict__["forward"] = taken_over(index)
        taken = block.__dict__["forward"]
        taken.__wrapped__ = originals[index]
    model(**tiny.inputs(1.0))
    return runner


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CogVideoXTransformer3DModel", [("transformer_blocks", (HIDDEN, TEXT), None)]),
        ("WanTransformer3DModel", [("blocks", (HIDDEN,), None)]),
        (
            "AuraFlowTransformer2DModel",
            [
                ("joint_transformer_blocks", (TEXT, HIDDEN), None),
                ("single_transformer_blocks", (TEXT, HIDDEN), HIDDEN),
            ],
        ),
        (
            "HiDreamImageTransformer2DModel",
            [
                ("double_stream_blocks", (HIDDEN, TEXT), None),
                ("single_stream_blocks", (HIDDEN, TEXT), HIDDEN),
            ],
        ),
        (
            "LatteTransformer3DModel",
            [
                ("transformer_blocks", (HIDDEN,), None),
                ("temporal_transformer_blocks", (HIDDEN,), None),
            ],
        ),
        (
            "LTX2VideoTransformer3DModel",
            [("transformer_blocks", (HIDDEN, "audio_hidden_states"), None)],
        ),
    ],
)
def test_returns_are_found_at_the_first_call(name, expected):
    assert resolved(name) == expected


UNRESOLVED = BlockList(attribute="blocks", streams=(HIDDEN,), returns=None)


def tokens(count, width=4, seed=0):
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))


def test_streams_of_one_shape_are_told_apart_by_their_values():
    x, text = tokens(5, seed=1), tokens(5, seed=2)
    arguments = {HIDDEN: x, TEXT: text, "temb": tokens(5, seed=3)}
    changed = (text + 0.3 * tokens(5, seed=4), x + 0.3 * tokens(5, seed=5))
    assert resolve_returns(UNRESOLVED, arguments, changed, None).returns == (TEXT, HIDDEN)
    assert resolve_returns(UNRESOLVED, arguments, changed[::-1], None).returns == (HIDDEN, TEXT)


@pytest.mark.parametrize(
    ("result", "returns"),
    [(tokens(5), (HIDDEN,)), ((tokens(5), tokens(3)), (HIDDEN, TEXT))],
)
def test_a_new_run_resolves_the_returns_anew(result, returns):
    model = made("WanTransformer3DModel")
    runner = BlockRunner(model, infer_family(model))
    for block_result, expected in ((tokens(5), (HIDDEN,)), (result, returns)):
        runner.begin_run()
        assert [each.returns for each in runner.block_lists] == [None]
        runner.call(0, lambda x=block_result, **_: x, (tokens(5), tokens(3), None, None), {})
        assert [each.returns for each in runner.block_lists] == [expected]


def test_a_stream_that_was_not_returned_may_not_be_returned_later():
    layout = StreamLayout(HIDDEN)
    known = BlockList(attribute="blocks", streams=(HIDDEN,), returns=(HIDDEN, None))
    layout.read_arguments(known, {HIDDEN: tokens(5)})
    assert list(layout.read_result(known, (tokens(5), None))) == [HIDDEN]
    with pytest.raises(ValueError, match="blocks: a block returns a stream that it did not return"):
        layout.read_result(known, (tokens(5), tokens(3)))


def test_packed_latents_are_read_and_written_as_they_were():
    layout = StreamLayout(HIDDEN)
    packed = BlockList(
        attribute="blocks", streams=(HIDDEN,), returns=(HIDDEN, "audio"), packed=("audio",)
    )
    video, audio = tokens(5), tokens(3, width=2)
    streams = layout.read_arguments(packed, {HIDDEN: video, "audio": audio})
    assert {name: list(x.shape) for name, x in streams.items()} == {HIDDEN: [1, 1, 5 * 4 + 3 * 2]}
    written = layout.write_result(packed, streams)
    assert torch.equal(written[0], video) and torch.equal(written[1], audio)


def test_transposed_blocks_get_frames_as_tokens():
    layout = StreamLayout("x")
    plain = BlockList(attribute="blocks", streams=("x",), returns=("x",))
    turned = replace(plain, attribute="temporal_blocks", transposed=True)
    frames, per_frame = 3, 5
    x = torch.arange(2 * frames * per_frame * 4.0).view(2 * frames, per_frame, 4)
    as_frames = x.view(2, frames, per_frame, 4).transpose(1, 2).reshape(2 * per_frame, frames, 4)
    assert torch.equal(layout.read_arguments(plain, {"x": x})["x"], x)
    read = layout.read_arguments(turned, {"x": as_frames})
    assert torch.equal(read["x"], x)
    assert torch.equal(layout.write_result(turned, read), as_frames)


def test_a_stream_that_is_dropped_has_no_name():
    arguments = {HIDDEN: tokens(5), TEXT: tokens(3)}
    found = resolve_returns(UNRESOLVED, arguments, (None, tokens(5)), None)
    assert (found.streams, found.returns) == ((HIDDEN,), (None, HIDDEN))


@pytest.mark.parametrize(
    ("arguments", "result", "before", "named"),
    [
        ({HIDDEN: tokens(5)}, tokens(6), None, r"return \[\[1, 6, 4\]\], which do not continue"),
        ({HIDDEN: [tokens(5)]}, tokens(5), None, "hidden_states is not a tensor of tokens"),
        ({HIDDEN: tokens(5)}, {"x": 1}, None, "where streams are tensors"),
        (
            {HIDDEN: tokens(7)},
            tokens(7),
            {HIDDEN: tokens(5), TEXT: tokens(3)},
            "neither a stream nor the sequence of streams",
        ),
        (
            {HIDDEN: tokens(8)},
            tokens(8),
            {HIDDEN: tokens(5), TEXT: tokens(3)},
            "neither a stream nor the sequence of streams",
        ),
    ],
)
def test_what_cannot_be_resolved_is_refused(arguments, result, before, named):
    with pytest.raises(ValueError, match=f"blocks: .*{named}"):
        resolve_returns(UNRESOLVED, arguments, result, before)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("Cosmos3OmniTransformer", "has no argument for the latents: it takes input_ids, text_in"),
        ("RFD4ProteinaTransformer", "has no list of blocks under a known name"),
    ],
)
def test_a_model_of_diffusers_that_tells_too_little_is_refused(name, named):
    model = getattr(diffusers, name)(**UNTOLD[name])
    with pytest.raises(ValueError, match=f"{name} {named}"):
        infer_family(model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states):
        return self.linear(hidden_states)


class Stack(nn.Module):
    """A model with three blocks that are called in the order given, each on the one before."""

    def __init__(self, order=(0, 1, 2)):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.order = order

    def forward(self, hidden_states, timestep):
        for index in self.order:
            hidden_states = self.blocks[index](hidden_states)
        return (hidden_states,)


class Shrinking(Stack):
    def forward(self, hidden_states, timestep):
        hidden_states = self.blocks[1](self.blocks[0](hidden_states))
        return (self.blocks[2](hidden_states[:, :2]),)


class NoBlocks(nn.Module):
    def forward(self, hidden_states, timestep):
        return hidden_states


class NoTimestep(Stack):
    def forward(self, hidden_states):
        return hidden_states


class NoLatents(Stack):
    def forward(self, picture, timestep):
        return picture


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (NoBlocks, "NoBlocks has no list of blocks under a known name; known are transformer_bl"),
        (NoTimestep, "the forward of NoTimestep has no argument for the timestep"),
        (NoLatents, "the forward of NoLatents has no argument for the latents: it takes picture"),
    ],
)
def test_a_model_that_tells_too_little_is_refused(model, named):
    with pytest.raises(ValueError, match=named):
        infer_family(model())
    with pytest.raises(ValueError, match=f"no cache adapter for transformer.*{named}"):
        enable_cache(model(), "Fb", rel_l1_thresh=0.1)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: Stack((0, 2, 1)), "Stack: block 2 of the stack was called where it was the turn"),
        (lambda: Stack((1, 0, 2)), "Stack: block 1 of the stack was called where it was the turn"),
        (Shrinking, r"goes into the stack as \[1, 5, 4\] and comes out as \[1, 2, 4\]"),
    ],
)
def test_a_model_whose_blocks_run_otherwise_is_refused_at_its_first_call(model, named):
    model = enable_cache(model(), "Fb", rel_l1_thresh=0.1)
    with pytest.raises(ValueError, match=named):
        model(tokens(5), torch.tensor(1.0))


def test_a_call_that_broke_off_does_not_confuse_the_next_one():
    model = enable_cache(Stack((0, 2)), "Fb", rel_l1_thresh=0.1)
    with pytest.raises(ValueError, match="block 2"):
        model(tokens(5), torch.tensor(1.0))
    model.order = (0, 1, 2)
    blocks = [block.linear for block in model.blocks]
    expected = blocks[2](blocks[1](blocks[0](tokens(5))))
    assert torch.equal(model(tokens(5), torch.tensor(1.0))[0], expected)


# -- the modulated input --------------------------------------------------------------------------


def test_the_attention_input_is_the_norm_modulated_by_the_timestep():
    block = make_tiny_flux().transformer_blocks[0]
    x, text, temb = tokens(16, 32), tokens(6, 32, seed=1), tokens(1, 32, seed=2)[0]
    arguments = {HIDDEN: x, TEXT: text, "temb": temb, "image_rotary_emb": None}
    found = attention_input(block, arguments)
    shift, scale, *_ = block.norm1.linear(torch.nn.functional.silu(temb)).chunk(6, dim=1)
    plain = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    assert torch.allclose(found, plain * (1 + scale[:, None]) + shift[:, None], atol=1e-6)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_block_without_attention_has_no_modulated_input():
    with pytest.raises(ValueError, match="no modulated input: Block enters no attention"):
        attention_input(Block(), {HIDDEN: tokens(5)})
    model = enable_cache(Stack(), "Tea", rel_l1_thresh=0.1)
    with pytest.raises(ValueError, match="no modulated input: Block enters no attention"):
        model(tokens(5), torch.tensor(1.0))


def test_the_order_of_returns_is_not_known_before_a_call():
    assert infer_family(made("FluxTransformer2DModel")).hidden_states_first is None
    assert registry.family_named("flux").hidden_states_first is False
    assert registry.family_named("pixart").hidden_states_first is True


def test_an_inferred_family_has_returns_to_be_resolved():
    family = infer_family(Stack())
    assert isinstance(family, ModelFamily) and family.block_lists == (UNRESOLVED,)
