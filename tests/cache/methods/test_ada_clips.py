"""AdaCache and MoReg on clips against the published rule, with two residuals a block."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.cached import refreshed
from tests.published_ada import (
    EVERY_STEP,
    STEPS,
    PublishedRule,
    assert_varied,
    quantile_codebook,
)
from xfuser_adacorr import BlockList, CacheConfig, DecisionScope, ModelFamily, enable_cache
from xfuser_adacorr.model_executor.cache.signals import motion_sums
from xfuser_adacorr.model_executor.cache.sites.model import ModelSite
from xfuser_adacorr.model_executor.cache.sites.stack import Stack
from xfuser_adacorr.models import STDiT3Transformer3DModel

FRAMES = 5


def attention_residual(block, arguments):
    return block.attention_branch(
        arguments["hidden_states"],
        arguments["temb"],
        arguments["num_frames"],
        arguments.get("rotary_emb"),
    )


def clip_family():
    stream = ("hidden_states",)
    lists = (
        BlockList(attribute="spatial_blocks", streams=stream, returns=stream),
        BlockList(
            attribute="temporal_blocks",
            streams=stream,
            returns=stream,
            attention_residual=attention_residual,
            interleaved=True,
        ),
    )
    return ModelFamily(
        name="clips",
        transformer_class="STDiT3Transformer3DModel",
        block_lists=lists,
        latents="hidden_states",
        timestep="timestep",
        full_noise_timestep=1000.0,
        output_stream="hidden_states",
        modulated_input=lambda block, a: block.modulated_input(a["hidden_states"], a["temb"]),
        select_tokens=lambda arguments, index: {},
        published_polynomial=lambda config: None,
        num_frames=lambda arguments: arguments["num_frames"],
    )


@pytest.fixture
def clip_model():
    torch.manual_seed(0)
    return STDiT3Transformer3DModel(
        hidden_size=32,
        depth=3,
        num_heads=2,
        caption_channels=8,
        model_max_length=5,
        input_sq_size=32,
    ).eval()


@pytest.fixture(params=["plain", "masked"])
def x_mask(request):
    if request.param == "plain":
        return None
    return torch.arange(FRAMES)[None] > 1


def sample_clip(model, steps=STEPS, x_mask=None, before_call=lambda: None):
    """Euler steps from seeded noise."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, FRAMES, 4, 4, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    for index in range(steps):
        before_call()
        sigma = 1 - index / steps
        timestep = torch.tensor([1000.0 * sigma])
        v = model(x, timestep, text, x_mask=x_mask, return_dict=False)[0][:, :4]
        x = x + v / steps
    return x


def interrupt_at(index):
    left = iter(range(index))

    def before_call():
        if next(left, None) is None:
            raise InterruptedError

    return before_call


def published_clip_run(model, rule, steps=STEPS, x_mask=None):
    """Sample with two residuals a block, each added on its own, as AdaCache was published."""
    model = copy.deepcopy(model)
    middle = model.temporal_blocks[(len(model.temporal_blocks) - 1) // 2]

    def cached_forward(block):
        kept = {}

        def forward(
            hidden_states,
            encoder_hidden_states,
            temb,
            num_frames,
            encoder_attention_mask=None,
            rotary_emb=None,
            share=None,
        ):
            x = hidden_states
            if not rule.active:
                return x + kept["attention"] + kept["rest"]
            kept["attention"] = block.attention_branch(x, temb, num_frames, rotary_emb)
            if block is middle:
                rule.measure(kept["attention"])
            x = x + kept["attention"]
            cross = block.cross_attention_branch(x, encoder_hidden_states, encoder_attention_mask)
            x = x + cross
            feed_forward = block.feed_forward_branch(x, temb)
            kept["rest"] = cross + feed_forward
            return x + feed_forward

        return forward

    for block in [*model.spatial_blocks, *model.temporal_blocks]:
        block.forward = cached_forward(block)
    return sample_clip(model, steps, x_mask, rule.begin_step)


def cached_clip_run(model, steps=STEPS, x_mask=None, **options):
    site = install_on_clips(model, num_steps=steps, **options)
    x = sample_clip(model, steps, x_mask)
    summary = site.summary()
    site.uninstall()
    return x, summary


def install_on_clips(model, family=None, **options):
    method, family = CacheConfig(use_cache="Ada", **options), family or clip_family()
    stack = Stack(model, family, method.make_stack(model, family))
    names = (family.latents, family.timestep, family.full_noise_timestep)
    site = ModelSite(method, model, names, DecisionScope(), stack)
    site.install()
    return site


def clip_codebook(model, rates=(4, 3, 2), steps=STEPS, **rule):
    every = PublishedRule(EVERY_STEP, steps, **rule)
    published_clip_run(model, every, steps)
    return quantile_codebook(every.changes, rates)


def test_clips_follow_the_published_rule_with_two_residuals_a_block(clip_model, x_mask):
    codebook = clip_codebook(clip_model)
    rule = PublishedRule(codebook)
    expected = published_clip_run(clip_model, rule, x_mask=x_mask)
    x, summary = cached_clip_run(clip_model, x_mask=x_mask, codebook=codebook)
    assert refreshed(summary) == rule.computed
    assert_varied(rule.computed)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x, sample_clip(clip_model, x_mask=x_mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "divisor"), [(30, 1.0), (STEPS, 1.2)])
def test_moreg_follows_the_published_rule(clip_model, steps, divisor):
    codebook = clip_codebook(clip_model, steps=steps, frames=FRAMES, divisor=divisor)
    rule = PublishedRule(codebook, steps, frames=FRAMES, divisor=divisor)
    expected = published_clip_run(clip_model, rule, steps)
    options = {"codebook": codebook, "moreg": True, "moreg_divisor": divisor}
    x, summary = cached_clip_run(clip_model, steps, **options)
    assert refreshed(summary) == rule.computed
    assert_varied(rule.computed)
    changes = [call.base_signal for call in summary.trace.calls]
    assert list(dict.fromkeys(changes[2:-1])) == pytest.approx(rule.changes[:-2], rel=1e-3)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_second_run_knows_nothing_of_the_first(clip_model):
    codebook = clip_codebook(clip_model, frames=FRAMES)
    site = install_on_clips(clip_model, codebook=codebook, moreg=True, num_steps=STEPS)
    sample_clip(clip_model)
    first = site.summary().trace.calls
    sample_clip(clip_model)
    assert site.summary().trace.calls == first
    with pytest.raises(InterruptedError):
        sample_clip(clip_model, before_call=interrupt_at(STEPS // 2))
    sample_clip(clip_model)
    assert site.summary().trace.calls == first


def test_compiled_clip_blocks_give_the_published_signal(clip_model):
    codebook = clip_codebook(clip_model)
    rule = PublishedRule(codebook)
    expected = published_clip_run(clip_model, rule)
    torch._dynamo.reset()
    for block in [*clip_model.spatial_blocks, *clip_model.temporal_blocks]:
        block.compile(fullgraph=True, backend="eager")
    x, summary = cached_clip_run(clip_model, codebook=codebook)
    assert refreshed(summary) == rule.computed
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_signal_is_of_the_middle_temporal_block(clip_model, depth):
    clip_model.spatial_blocks = clip_model.spatial_blocks[:depth]
    clip_model.temporal_blocks = clip_model.temporal_blocks[:depth]
    site = install_on_clips(clip_model, codebook=EVERY_STEP)
    # Open-Sora: block 13 of 28, counted from 0
    assert site.stack.method.signal_block is clip_model.temporal_blocks[(depth - 1) // 2]


def test_motion_is_its_formula_and_adds_up_over_shares_of_every_frame():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, FRAMES * 6, 8, generator=generator)
    numerator, denominator = (float(s) for s in motion_sums(p, FRAMES))
    frames = p.double().unflatten(1, (FRAMES, 6))
    assert numerator == pytest.approx(float(frames.diff(dim=1).abs().sum()), rel=1e-6)
    magnitude = frames[:, 1:].abs().sum() + frames[:, :-1].abs().sum()
    assert denominator == pytest.approx(float(magnitude), rel=1e-6)
    shares = [p.unflatten(1, (FRAMES, 6))[:, :, s].flatten(1, 2) for s in (slice(2), slice(2, 6))]
    summed = torch.tensor([motion_sums(share, FRAMES) for share in shares]).sum(0)
    assert summed.tolist() == pytest.approx([numerator, denominator], rel=1e-6)


def test_a_still_clip_has_no_motion():
    frame = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    numerator, denominator = motion_sums(frame.repeat(1, FRAMES, 1), FRAMES)
    assert numerator == 0.0 and denominator > 0.0


def test_moreg_on_images_is_refused(transformer, clip_model):
    with pytest.raises(ValueError, match="moreg must be False for FluxTransformer2DModel"):
        enable_cache(transformer, "Ada", moreg=True, num_steps=30)
    install_on_clips(clip_model, codebook=EVERY_STEP, moreg=True, num_steps=30)
    image = torch.zeros(1, 4, 1, 4, 4)
    with pytest.raises(ValueError, match="moreg must be False for a single frame"):
        clip_model(image, torch.tensor([900.0]), torch.zeros(1, 5, 8))


def test_moreg_needs_a_family_with_frames(clip_model):
    undescribed = replace(clip_family(), num_frames=None)
    with pytest.raises(ValueError, match="family 'clips' describes no frames"):
        install_on_clips(clip_model, undescribed, codebook=EVERY_STEP, moreg=True, num_steps=30)
