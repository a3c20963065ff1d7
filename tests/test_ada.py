"""AdaCache and MoReg against the published rule, on images and on clips, written out here."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.tiny import all_blocks, embed, euler, head, run_blocks
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.codebook import Codebook, published_codebook
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.core.signals import motion_sums
from xfuser_adacorr.model_executor.cache.calibration import load_ada_codebook, save_ada_codebook
from xfuser_adacorr.model_executor.cache.clock import TimestepClock
from xfuser_adacorr.model_executor.cache.codebook_fitting import AdaRecorder, step_shares
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import (
    BlockList,
    ModelFamily,
)
from xfuser_adacorr.model_executor.cache.engine import CacheEngine, engine_of
from xfuser_adacorr.models import STDiT3Transformer3DModel

STEPS = 18
FRAMES = 5
EVERY_STEP = {1.0: 1}


class PublishedRule:
    """The schedule and the metric of AdaCache in float64; steps are counted from 1."""

    def __init__(self, codebook, steps=STEPS, *, frames=None, divisor=1.0):
        self.codebook, self.steps = codebook, steps
        self.frames, self.divisor = frames, divisor
        self.step = self.previous = 0
        self.rate, self.motion, self.residual = 1, 1.0, None
        self.computed, self.changes = [], []

    def begin_step(self):
        self.step += 1
        self.active = self.step == self.previous + self.rate
        self.active = self.active or self.step in (1, self.steps - 1, self.steps)
        self.computed.append(self.active)
        return self.active

    def measure(self, p):
        p, rate = p.double(), self.rate
        if self.residual is not None:
            change = (self.residual - p).abs().sum() / self.residual.abs().sum() / rate
            if self.frames is not None:
                change = change * self.motion_factor(p, rate)
            self.changes.append(float(change))
            self.rate = next(
                (value for key, value in self.codebook.items() if change < key),
                list(self.codebook.values())[-1],
            )
        self.residual, self.previous = p, self.step

    def motion_factor(self, p, rate):
        motion = 1.0
        if 4 * self.steps / 30 <= self.step <= 26 * self.steps / 30:
            frames = p.unflatten(1, (self.frames, -1))
            later, earlier = frames[:, 1:], frames[:, :-1]
            motion = (later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum())
            motion = float((motion / 0.385) ** 8 / self.divisor)
        gradient = 10 * (motion - self.motion) / rate
        self.motion = motion
        return motion + abs(gradient)


def quantile_codebook(changes, rates):
    """Thresholds that split what an uncached run measures evenly among the rates."""
    shares = np.arange(1, len(rates)) / len(rates)
    return dict(zip([*np.quantile(changes, shares).tolist(), 1e9], rates, strict=True))


def refreshed(summary):
    return [call.refreshed for call in summary.trace.calls]


def assert_varied(computed):
    """At least two different gaps lie between the computed steps, besides the forced ones."""
    at = [i for i, active in enumerate(computed) if active]
    assert len({b - a for a, b in pairwise(at[:-2])}) > 1


# -- FLUX ------------------------------------------------------------------------------------------


def flux_reference(model, rule):
    """FLUX under AdaCache; p is the whole residual of the middle block."""
    memory, blocks = {}, all_blocks(model)
    middle = (len(blocks) - 1) // 2

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        if rule.begin_step():
            before, e = run_blocks(blocks[:middle], h, e, shared)
            after, e = run_blocks(blocks[middle : middle + 1], before, e, shared)
            rule.measure(after - before)
            out, _ = run_blocks(blocks[middle + 1 :], after, e, shared)
            memory["residual"] = out - h
        return head(model, h + memory["residual"], shared)

    return velocity


def flux_codebook(sampler, rates=(5, 3, 2)):
    rule = PublishedRule(EVERY_STEP)
    euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    return quantile_codebook(rule.changes, rates)


def test_flux_follows_the_published_rule(sampler):
    codebook = flux_codebook(sampler)
    rule = PublishedRule(codebook)
    expected = euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    enable_cache(sampler.transformer, "Ada", codebook=codebook, scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    summary = cache_summary(sampler.transformer)
    assert refreshed(summary) == rule.computed
    assert_varied(rule.computed)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    changes = [call.base_signal for call in summary.trace.calls]
    assert changes[:2] == [None, None]
    assert list(dict.fromkeys(changes[2:-1])) == pytest.approx(rule.changes[:-2], rel=1e-4)


@pytest.mark.parametrize(("steps", "rate"), [(8, 20), (9, 3)])
def test_first_two_and_last_two_calls_are_computed(sampler, steps, rate):
    enable_cache(sampler.transformer, "Ada", codebook={1e9: rate}, scheduler=sampler.scheduler)
    sampler.run(steps)
    calls = refreshed(cache_summary(sampler.transformer))
    expected = {0, 1, steps - 2, steps - 1} | set(range(1, steps, rate))
    assert [i for i, computed in enumerate(calls) if computed] == sorted(expected)


def test_every_call_computed_is_bit_equal(sampler):
    plain = sampler.run(STEPS)
    enable_cache(sampler.transformer, "Ada", rel_l1_thresh=0.0, scheduler=sampler.scheduler)
    assert torch.equal(sampler.run(STEPS), plain)
    assert cache_summary(sampler.transformer).compute_fraction == 1.0


def test_rel_l1_thresh_scales_the_thresholds(sampler):
    codebook, runs = flux_codebook(sampler), []
    halved = {key / 2: rate for key, rate in codebook.items()}
    for options in ({"codebook": halved}, {"codebook": codebook, "rel_l1_thresh": 0.5}):
        enable_cache(sampler.transformer, "Ada", scheduler=sampler.scheduler, **options)
        sampler.run(STEPS)
        runs.append(refreshed(cache_summary(sampler.transformer)))
        disable_cache(sampler.transformer)
    assert runs[0] == runs[1] and not all(runs[0])


def test_warmup_calls_divide_by_the_steps_that_really_lie_between(sampler):
    enable_cache(
        sampler.transformer,
        "Ada",
        codebook={1e9: 3},
        warmup_steps=6,
        scheduler=sampler.scheduler,
    )
    sampler.run(STEPS)
    calls = cache_summary(sampler.transformer).trace.calls
    assert [call.step_index for call in calls if call.refreshed][:8] == [0, 1, 2, 3, 4, 5, 8, 11]
    rule = PublishedRule(EVERY_STEP)
    euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    measured = [call.base_signal for call in calls[2:7]]
    assert measured == pytest.approx(rule.changes[:5], rel=1e-4)


@pytest.mark.parametrize("mode", ["adaptive", "literal"])
def test_corrected_variant_keeps_the_signal_and_no_residual(sampler, mode):
    config = CacheConfig(
        use_cache="Ada", codebook={1e9: 2}, enable_adacorrection=True, adacorr_mode=mode
    )
    enable_cache(sampler.transformer, config, scheduler=sampler.scheduler)
    sampler.run(STEPS, stop_after=10)
    (branch,) = engine_of(sampler.transformer).generation.branches.values()
    assert branch.method_state.residual is None
    assert branch.method_state.reference is not None
    assert cache_summary(sampler.transformer).reused_steps > 0


def test_correction_may_only_shorten_the_distance(sampler):
    def computed(**options):
        enable_cache(
            sampler.transformer, "Ada", codebook={1e9: 5}, scheduler=sampler.scheduler, **options
        )
        sampler.run(STEPS)
        calls = cache_summary(sampler.transformer).trace.calls
        disable_cache(sampler.transformer)
        return [i for i, call in enumerate(calls) if call.refreshed]

    tight = computed(enable_adacorrection=True, adacorr_tolerance=1e-3)
    assert len(tight) > len(computed())
    assert all(b - a <= 5 for a, b in pairwise(tight))


def test_compiled_blocks_stay_one_graph_with_the_same_decisions(sampler):
    options = {"codebook": flux_codebook(sampler), "scheduler": sampler.scheduler}
    enable_cache(sampler.transformer, "Ada", **options)
    eager = sampler.run(STEPS)
    decisions = refreshed(cache_summary(sampler.transformer))
    torch._dynamo.reset()
    for block in all_blocks(sampler.transformer):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(sampler.run(STEPS), eager, rtol=1e-4, atol=1e-4)
    assert refreshed(cache_summary(sampler.transformer)) == decisions


# -- Open-Sora -------------------------------------------------------------------------------------


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
        ),
    )
    return ModelFamily(
        name="clips",
        transformer_class="STDiT3Transformer3DModel",
        block_lists=lists,
        latents="hidden_states",
        timestep="timestep",
        output_stream="hidden_states",
        modulated_input=lambda block, a: block.modulated_input(a["hidden_states"], a["temb"]),
        select_tokens=lambda arguments, index: {},
        make_output=lambda sample, return_dict: (sample,),
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
    """Euler steps along the predicted velocity, from seeded noise."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, FRAMES, 4, 4, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    for index in range(steps):
        before_call()
        timestep = torch.tensor([1000.0 * (1 - index / steps)])
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
    engine = install_on_clips(model, num_steps=steps, **options)
    x = sample_clip(model, steps, x_mask)
    summary = engine.summary()
    engine.uninstall()
    return x, summary


def install_on_clips(model, **options):
    config = CacheConfig(use_cache="Ada", **options)
    clock = TimestepClock(config.num_steps)
    engine = CacheEngine(model, clip_family(), config, clock, DecisionScope())
    engine.install()
    return engine


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


def test_second_generation_knows_nothing_of_the_first(clip_model):
    codebook = clip_codebook(clip_model, frames=FRAMES)
    engine = install_on_clips(clip_model, codebook=codebook, moreg=True, num_steps=STEPS)
    sample_clip(clip_model)
    first = engine.summary().trace.calls
    sample_clip(clip_model)
    assert engine.summary().trace.calls == first
    with pytest.raises(InterruptedError):
        sample_clip(clip_model, before_call=interrupt_at(STEPS // 2))
    sample_clip(clip_model)
    assert engine.summary().trace.calls == first


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
    clip_model.temporal_blocks = clip_model.temporal_blocks[:depth]
    engine = install_on_clips(clip_model, codebook=EVERY_STEP)
    # Open-Sora: block 13 of 28, counted from 0
    assert engine.method.signal_block is clip_model.temporal_blocks[(depth - 1) // 2]


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


# -- codebooks -------------------------------------------------------------------------------------


def test_a_threshold_must_be_above_the_change():
    codebook = Codebook.of({0.25: 4, 0.5: 2, 1.0: 1})
    below = np.nextafter(0.25, 0.0)
    changes = (0.0, below, 0.25, 0.5, 0.75, 1.0, 7.0, float("inf"))
    assert [codebook.rate(c) for c in changes] == [4, 4, 2, 1, 1, 1, 1, 1]
    assert [codebook.rate(c, scale=2.0) for c in (below, 0.25, 0.5, 1.0)] == [4, 4, 2, 1]
    assert codebook.rate(0.0, scale=0.0) == 1


@pytest.mark.parametrize(
    ("name", "steps", "rates"),
    [
        ("fast", 30, [6, 6, 6, 6, 6, 5, 4, 1]),
        ("fast", 65, [6, 6, 6, 6, 6, 5, 4, 1]),
        ("fast", 66, [12, 10, 8, 6, 4, 3, 3, 3]),
        ("fast", 100, [12, 10, 8, 6, 4, 3, 3, 3]),
        ("slow", 50, [3, 3, 3, 3, 3, 2, 1, 1]),
    ],
)
def test_published_codebook_of_the_nearest_step_count(name, steps, rates):
    codebook = published_codebook(name, steps)
    changes = (0.02, 0.03, 0.05, 0.07, 0.0799 if steps < 66 else 0.09, 0.12, 0.2, 0.5)
    assert [codebook.rate(c) for c in changes] == rates


def test_unpublished_codebook_is_refused(sampler):
    with pytest.raises(ValueError, match="'slow' is not published for 100 steps.*'fast' for 30"):
        enable_cache(sampler.transformer, "Ada", codebook="slow", num_steps=80)
    enable_cache(sampler.transformer, "Ada", codebook="slow", scheduler=sampler.scheduler)
    with pytest.raises(ValueError, match="'slow' is not published for 100 steps"):
        sampler.run(100)
    sampler.run(12)
    assert cache_summary(sampler.transformer).num_steps == 12


def test_unknown_number_of_steps_is_refused(sampler):
    enable_cache(sampler.transformer, "Ada")
    with pytest.raises(ValueError, match="num_steps must be given for Ada"):
        sampler.run(12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codebook": "medium"}, ValueError, "codebook must be one of fast, slow"),
        ({"codebook": {}}, ValueError, "got no entry"),
        ({"codebook": {0.2: 2, 0.1: 1}}, ValueError, "got threshold 0.1 after 0.2"),
        ({"codebook": {0.0: 2}}, ValueError, "got threshold 0.0 after 0.0"),
        ({"codebook": {float("inf"): 2}}, ValueError, "got threshold inf"),
        ({"codebook": {0.1: 0}}, ValueError, "got rate 0"),
        ({"codebook": {0.1: 1.5}}, TypeError, "got rate 1.5"),
        ({"codebook": {"0.1": 1}}, TypeError, "got threshold '0.1'"),
        ({"codebook": 3}, TypeError, "codebook must be .*, got 3"),
        ({"codebook": "fast", "calibration": "x"}, ValueError, "give one of them"),
        ({"moreg": 1}, TypeError, "moreg must be True or False"),
        ({"moreg_divisor": 0.0}, ValueError, "moreg_divisor must be above 0"),
        ({"use_cache": "Fb", "codebook": "fast"}, ValueError, "codebook is an option of Ada"),
        ({"use_cache": "Fb", "moreg": True}, ValueError, "moreg is an option of Ada"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**{"use_cache": "Ada", **options})


def test_configuration_with_a_codebook_survives_a_round_trip_and_is_hashable():
    config = CacheConfig(use_cache="Ada", codebook={0.1: 3, 1.0: 1})
    assert config.codebook == ((0.1, 3), (1.0, 1))
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(CacheConfig(use_cache="Ada", codebook=[[0.1, 3], [1.0, 1]]))


# -- calibration -----------------------------------------------------------------------------------


def test_calibrated_codebook_is_bound_to_its_model(tmp_path, sampler):
    from tests.tiny import make_tiny_flux

    model, path = sampler.transformer, tmp_path / "adacache.json"
    codebook = Codebook.of({0.1: 4, 1e9: 3})
    save_ada_codebook(path, codebook, model, {"num_inference_steps": 30})
    assert load_ada_codebook(model, str(path)) == codebook
    with pytest.raises(ValueError, match="was made for another model"):
        load_ada_codebook(make_tiny_flux(seed=1), str(path))
    model.register_to_config(_name_or_path=str(tmp_path))
    for options, used in (({}, codebook), ({"codebook": "fast"}, None)):
        enable_cache(model, "Ada", num_steps=30, **options)
        assert engine_of(model).method.codebook == used
        disable_cache(model)


@pytest.mark.parametrize("text", ["junk", "{}", '{"codebook": [[0.2, 1], [0.1, 1]]}'])
def test_calibration_files_that_are_none_are_rejected(tmp_path, transformer, text):
    path = tmp_path / "junk.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not an AdaCache calibration"):
        load_ada_codebook(transformer, str(path))


def test_recorder_measures_the_changes_of_uncached_runs(sampler):
    rule, recorder = PublishedRule(EVERY_STEP), AdaRecorder()
    expected = euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    with recorder.attached(sampler.transformer, FLUX):
        for _ in range(2):
            recorder.begin()
            assert torch.allclose(sampler.run(STEPS), expected, rtol=1e-5, atol=1e-5)
    assert recorder.changes == pytest.approx(2 * rule.changes[:-1], rel=1e-4)
    assert not hasattr(sampler.transformer, "_cache_call_handler")


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5, 0.8])
def test_fitted_codebook_covers_shares_that_give_the_fraction(fraction):
    rates = (6, 5, 4, 3, 2, 1)
    shares = step_shares(fraction, rates)
    assert shares.sum() == pytest.approx(1.0)
    assert (shares / np.array(rates)).sum() == pytest.approx(fraction, abs=1e-6)
    recorder = AdaRecorder(changes=np.linspace(0.01, 0.4, 5000).tolist())
    codebook = recorder.fit(fraction, rates)
    used = [codebook.rate(c) for c in recorder.changes]
    assert sum(1 / rate for rate in used) / len(used) == pytest.approx(fraction, rel=2e-3)


def test_a_fit_says_what_it_needs():
    with pytest.raises(ValueError, match="compute_fraction must be between 0.250 and 0.500"):
        step_shares(0.6, (4, 3, 2))
    with pytest.raises(ValueError, match="needs at least 12 changes, got 3"):
        AdaRecorder(changes=[0.1, 0.2, 0.3]).fit(0.3, (4, 3, 2))
