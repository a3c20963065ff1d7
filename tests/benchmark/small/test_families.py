"""The small pipelines beside FLUX's before any training, and the training loop."""

import dataclasses
import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiTPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    WanPipeline,
)

from benchmark.models.families import FAMILIES, Request
from benchmark.small import training, wan
from benchmark.small.autoencoder import absorb_shift, build_autoencoder, encode_pictures
from benchmark.small.card import training_document
from benchmark.small.clip_autoencoder import build_clip_autoencoder
from benchmark.small.dit import NULL_CLASS, class_ids, class_labels
from benchmark.small.families import NAMES, small_family
from benchmark.small.family import TrainingConfig
from benchmark.small.initialisation import isometric_
from benchmark.small.noise import (
    DWELL,
    HIGHEST_WEIGHT,
    SCHEDULER,
    NoiseBatch,
    NoiseExamples,
    loss_weights,
    noise_loss,
    sample_timesteps,
)
from benchmark.small.saving import save_pipeline
from benchmark.small.scenes import labels_scene, parse_prompt, scene_labels
from benchmark.small.splits import (
    CLASSES,
    MAKERS,
    held_back_labels,
    read_entries,
    read_split,
    split_file,
)
from benchmark.small.text import encode_masked, label_loss, tokenise_t5
from benchmark.small.training import train
from xfuser_adacorr.models import OpenSoraPipeline

NEW = ("pixart", "dit", "opensora", "sd", "sd3", "wan")
CLASS = {
    "pixart": PixArtSigmaPipeline,
    "dit": DiTPipeline,
    "opensora": OpenSoraPipeline,
    "sd": StableDiffusionPipeline,
    "sd3": StableDiffusion3Pipeline,
    "wan": WanPipeline,
}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    vae.register_to_config(shift_factor=-0.3, scaling_factor=1.7)
    return vae


@pytest.fixture(scope="module")
def vaes(vae):
    torch.manual_seed(3)
    return {AutoencoderKL: vae, AutoencoderKLWan: build_clip_autoencoder().eval()}


@pytest.fixture(scope="module")
def build(vaes):
    """Builds the pipeline of a small family around an untrained autoencoder of its own."""
    return lambda family: family.build_pipeline(vaes[family.autoencoding.model_class])


@pytest.fixture(scope="module")
def pipelines(build):
    torch.manual_seed(1)
    return {name: build(small_family(name)) for name in NEW}


@pytest.mark.parametrize("name", NAMES)
def test_the_split_files_are_what_the_code_makes(name):
    splits = MAKERS[name]()
    for split, size in (("development", 32), ("test", 64)):
        assert read_split(split, split_file(name)) == splits[split]
        assert len(splits[split]) == size


def test_no_two_entries_of_any_family_share_a_seed():
    seeds = [
        seed
        for name in NAMES
        for split in ("development", "test")
        for seed in read_entries(name, split).seeds
    ]
    assert len(set(seeds)) == len(seeds) == 96 * len(NAMES)


@pytest.mark.parametrize("name", ["pixart", "opensora", "wan"])
def test_prompts_of_both_splits_are_distinct(name):
    texts = [text for s in ("development", "test") for text in read_entries(name, s).texts]
    assert len(set(texts)) == 96


def test_every_class_is_asked_for_in_both_splits():
    for split in ("development", "test"):
        assert set(read_entries("dit", split).texts) == set(CLASSES)


def test_pictures_for_pixart_show_one_object_of_no_held_back_scene():
    from benchmark.small.pixart import draw_pictures

    pictures, labels = draw_pictures(700, torch.Generator().manual_seed(0))
    assert pictures.shape == (700, 3, 64, 64)
    assert (labels[:, 0] == 0).all()
    held_back = {tuple(row.tolist()) for row in held_back_labels("pixart")}
    assert held_back.isdisjoint(tuple(row.tolist()) for row in labels)


def test_classes_and_label_rows_agree():
    scenes = [parse_prompt(f"a {name} on a white plain background") for name in CLASSES[:6]]
    rows = scene_labels(scenes)
    assert class_ids(rows).tolist() == list(range(6))
    assert [labels_scene(row).objects[0] for row in rows] == [tuple(n.split()) for n in CLASSES[:6]]
    named = class_labels(CLASSES[:6])
    assert torch.equal(named[:, :3], rows[:, :3])
    assert (named[:, 3:] == -1).all()


def test_absorbing_the_shift_changes_neither_latents_nor_pictures(vae):
    pictures = torch.rand(2, 3, 64, 64)
    absorbed = absorb_shift(vae)
    assert absorbed.config.shift_factor == 0 and vae.config.shift_factor == -0.3
    latents = encode_pictures(vae, pictures)
    assert torch.allclose(encode_pictures(absorbed, pictures), latents, atol=1e-5)
    decoded = vae.decode(latents / 1.7 - 0.3).sample
    assert torch.allclose(absorbed.decode(latents / 1.7).sample, decoded, atol=1e-5)


def test_half_of_the_timesteps_dwell_where_shapes_are_decided():
    timesteps = sample_timesteps(1000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    inside = ((timesteps >= DWELL[0]) & (timesteps < DWELL[1])).float().mean()
    assert inside == pytest.approx(0.5 + 0.5 * (DWELL[1] - DWELL[0]) / 1000, abs=0.01)


def test_the_loss_is_the_velocitys_and_ignores_the_variance():
    timesteps = torch.tensor([100, 400])
    clean, noise, guess = torch.randn(3, 2, 8, 4, 4).unbind(0)
    share = SCHEDULER.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = SCHEDULER.add_noise(clean, noise, timesteps)
    guessed_clean = (noisy - (1 - share).sqrt() * guess) / share.sqrt()
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
    guessed_velocity = share.sqrt() * guess - (1 - share).sqrt() * guessed_clean
    batch = NoiseBatch(
        noisy=noisy,
        noise=noise,
        timesteps=timesteps,
        weights=loss_weights(timesteps),
        conditions=torch.zeros(2),
    )
    loss = noise_loss(torch.cat([guess, torch.randn(2, 8, 4, 4)], dim=1), batch)
    assert loss.item() == pytest.approx((guessed_velocity - velocity).square().mean().item(), 1e-3)
    assert loss_weights(torch.tensor([999])) == HIGHEST_WEIGHT


def test_dropped_conditions_become_the_empty_one():
    examples = NoiseExamples(
        latents=torch.randn(8, 8, 16, 16).half(),
        conditions=torch.arange(8),
        empty=torch.tensor(NULL_CLASS),
    )
    draws = [
        examples.batch(64, share, torch.Generator().manual_seed(0), "cpu").conditions
        for share in (0.0, 0.5, 1.0)
    ]
    assert (draws[0] < 8).all() and (draws[2] == NULL_CLASS).all()
    assert 10 < (draws[1] == NULL_CLASS).sum() < 54
    assert torch.equal(examples.conditions, torch.arange(8))


def test_an_untrained_noise_predictor_returns_its_latents(pipelines):
    latents, timesteps = torch.randn(3, 8, 16, 16), torch.tensor([999, 500, 0])
    dit = pipelines["dit"].transformer(
        latents, timestep=timesteps, class_labels=torch.tensor([0, 5, 1000])
    )
    pixart = pipelines["pixart"].transformer(
        latents,
        encoder_hidden_states=torch.randn(3, 16, 64),
        encoder_attention_mask=torch.ones(3, 16),
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    for sample in (dit.sample, pixart.sample):
        assert sample.shape == (3, 16, 16, 16)
        assert (sample[:, :8] - latents).square().mean().sqrt() < 0.06
        assert not sample[:, 8:].any()


def test_an_untrained_unet_keeps_scale_and_mean_of_its_latents(pipelines):
    latents = torch.randn(3, 8, 16, 16)
    given = torch.cat([latents, 0.9 * latents, latents + 0.1 * torch.randn(3, 8, 1, 1)])
    timesteps, states = torch.full((9,), 900), torch.randn(9, 24, 64)
    error = pipelines["sd"].unet(given, timesteps, states).sample - given
    # what an error is multiplied by in the picture that is predicted at timestep 900
    allowed = 0.3 * SCHEDULER.alphas_cumprod[900].sqrt()
    assert error.square().mean((1, 2, 3)).sqrt().max() < allowed


def test_an_untrained_video_transformer_predicts_zero(pipelines):
    sample = (
        pipelines["opensora"]
        .transformer(torch.randn(1, 8, 2, 16, 16), torch.tensor([500.0]), torch.randn(1, 16, 64))
        .sample
    )
    assert sample.shape == (1, 16, 2, 16, 16)
    assert not sample.any()


def test_an_untrained_wan_transformer_predicts_zero(pipelines):
    transformer = pipelines["wan"].transformer
    latents = torch.randn(2, 16, 3, 8, 8)
    sample = transformer(latents, torch.tensor([500.0, 20.0]), torch.randn(2, 16, 64)).sample
    assert sample.shape == latents.shape
    assert not sample.any()


def test_a_patch_that_does_not_fit_beside_the_positions_raises():
    with pytest.raises(ValueError, match="does not fit"):
        isometric_(torch.nn.Conv2d(8, 40, 2, stride=2), torch.randn(16, 40))


@pytest.mark.parametrize("name", NEW)
def test_a_saved_pipeline_loads_and_generates(name, pipelines, tmp_path):
    save_pipeline(pipelines[name], tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 12 * 2**20
    loaded = CLASS[name].from_pretrained(tmp_path, local_files_only=True)
    modules = [m for m in loaded.components.values() if isinstance(m, torch.nn.Module)]
    assert {p.dtype for m in modules for p in m.parameters()} == {torch.float32}
    family = small_family(name)
    text = read_entries(name, "test", 1).texts[0]
    plain, guided = (
        family.generate(loaded, [text], [7], steps=2, guidance_scale=scale) for scale in (1.0, 3.0)
    )
    shape = (1, FAMILIES[name].num_frames, 3, 64, 64) if family.clips else (1, 3, 64, 64)
    assert plain.shape == guided.shape == shape
    assert plain.min() >= 0 and plain.max() <= 1


@pytest.mark.parametrize("name", ["pixart", "opensora"])
def test_a_pipeline_is_saved_the_same_before_and_after_use(name, vae, tmp_path):
    family = small_family(name)
    pipeline = family.build_pipeline(vae)
    save_pipeline(pipeline, tmp_path / "before")
    family.generate(pipeline, read_entries(name, "test", 1).texts, [7], steps=1)
    used = pipeline.tokenizer.backend_tokenizer.padding
    assert used is not None
    save_pipeline(pipeline, tmp_path / "after")
    before, after = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
        for folder in (tmp_path / "before", tmp_path / "after")
    )
    assert before == after
    assert pipeline.tokenizer.backend_tokenizer.padding == used


def test_the_saved_dit_knows_its_class_names(pipelines, tmp_path):
    save_pipeline(pipelines["dit"], tmp_path)
    names = json.loads((tmp_path / "model_index.json").read_text())["id2label"]
    assert names == {str(index): name for index, name in enumerate(CLASSES)}
    loaded = DiTPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_label_ids(["red circle", "white cross"]) == [0, 27]


@pytest.mark.parametrize("name", ["pixart", "opensora"])
def test_training_encodes_text_as_the_pipeline_does(name, pipelines):
    pipeline, texts = pipelines[name], read_entries(name, "test", 4).texts
    ids = tokenise_t5(pipeline.tokenizer, texts)
    assert (ids[:, -1] == pipeline.tokenizer.pad_token_id).all()
    assert not (ids == pipeline.tokenizer.unk_token_id).any()
    states, mask = encode_masked(pipeline.text_encoder, ids)
    options = {"max_sequence_length": 16}
    if name == "pixart":
        options["do_classifier_free_guidance"] = False
    expected = pipeline.encode_prompt(texts, **options)
    assert torch.allclose(states, expected[0], atol=1e-6)
    assert torch.equal(mask, expected[1])


@pytest.mark.parametrize("name", ["pixart", "sd3", "wan"])
def test_the_benchmark_asks_for_as_many_tokens_as_were_trained_with(name, pipelines):
    """T5's padding is not masked everywhere: more of it gives other pictures, and slower."""
    pipeline, prompt = pipelines[name], read_entries(name, "test", 1).texts[0]
    tokenizer = pipeline.tokenizer_3 if name == "sd3" else pipeline.tokenizer
    asked = Request(text=prompt, height=64, width=64, num_frames=17, guidance_scale=3.0)
    options = FAMILIES[name].call(pipeline, asked)
    assert options["max_sequence_length"] == tokenise_t5(tokenizer, [prompt]).shape[1]


def test_training_encodes_text_as_wan_does(pipelines):
    pipeline = pipelines["wan"]
    texts = ["", *read_entries("wan", "test", 3).texts]
    ids = tokenise_t5(pipeline.tokenizer, texts)
    assert not (ids == pipeline.tokenizer.unk_token_id).any()
    expected, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert not expected[0, 1:].any() and expected[1, 10].any()
    assert torch.allclose(wan.encode(pipeline.text_encoder, ids), expected, atol=1e-6)


@pytest.mark.parametrize("name", NEW)
def test_the_loss_reaches_all_that_is_trained(name, build, tmp_path):
    family = small_family(name)
    torch.manual_seed(2)
    pipeline = build(family)
    examples = family.load_examples(pipeline, 2, 0, tmp_path / family.latents)
    model = torch.nn.ModuleDict({part: getattr(pipeline, part) for part in family.trained})
    with torch.enable_grad():
        # one step away from the zeros that hold gradients back
        for seed in range(2):
            batch = examples.batch(2, 0.0, torch.Generator().manual_seed(seed), "cpu")
            loss = family.loss(model, batch)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter += 1e-3 * torch.randn_like(parameter)
    for part in family.trained:
        gradients = [p.grad for p in model[part].parameters() if p.grad is not None]
        assert gradients and any(g.abs().max() > 0 for g in gradients)
    assert torch.isfinite(loss)


def test_open_sora_learns_from_clips_and_from_as_many_single_frames():
    from benchmark.small.opensora import ClipExamples

    frame_numbers = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(3, 8, 16, 16, 16)
    examples = ClipExamples(latents=frame_numbers.half(), ids=torch.zeros(2, 3, 16).long())
    seen = {1: [], 16: []}
    for seed in range(20):
        batch = examples.batch(2, 0.0, torch.Generator().manual_seed(seed), "cpu")
        count, _, frames = batch.noisy.shape[:3]
        assert count * frames == 32 and len(batch.ids) == len(batch.timesteps) == count
        sigma = batch.timesteps.view(-1, 1, 1, 1, 1) / 1000
        clean = (batch.noisy + sigma * batch.velocity)[:, 0, :, 0, 0].round()
        seen[frames] += clean.tolist()
    forwards = [float(number) for number in range(16)]
    assert {tuple(clip) for clip in seen[16]} == {tuple(forwards), tuple(forwards[::-1])}
    assert {frame for (frame,) in seen[1]} == set(forwards)


def test_wan_learns_from_clips_and_from_five_times_as_many_first_frames():
    numbers = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(3, 16, 5, 8, 8)
    ids = torch.arange(1, 4).view(3, 1).expand(3, 16)
    examples = wan.WanExamples(
        latents=numbers.half(), ids=ids, empty_ids=torch.zeros(1, 16, dtype=torch.int64)
    )
    lengths = set()
    for seed in range(20):
        batch = examples.batch(4, 0.5, torch.Generator().manual_seed(seed), "cpu")
        count, _, length = batch.noisy.shape[:3]
        assert count * length == 20 and len(batch.ids) == len(batch.timesteps) == count
        sigma = batch.timesteps.view(-1, 1, 1, 1, 1) / 1000
        clean = batch.noisy - sigma * batch.velocity
        assert torch.allclose(clean, numbers[:1, :, :length].expand_as(clean), atol=1e-5)
        lengths.add(length)
        if count == 20:
            assert 0 < (batch.ids[:, 0] == 0).sum() < 20
    assert lengths == {1, 5}


def test_columns_without_any_label_add_nothing_to_the_loss():
    logits = torch.randn(4, 5)
    labels = torch.tensor([[1, -1], [0, -1], [1, -1], [0, -1]])
    expected = torch.nn.functional.cross_entropy(logits[:, :2], labels[:, 0])
    assert label_loss(logits, labels, (2, 3)).item() == pytest.approx(expected.item())


def test_an_interrupted_training_resumes_exactly(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "export", lambda *arguments: None)
    family = small_family("dit")
    config = TrainingConfig(
        minutes=None, steps=2, batch_size=2, examples=4, compile=False, checkpoint_minutes=0.0
    )

    def interrupted(model, batch, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return family.loss(model, batch)

    with torch.enable_grad():
        (tmp_path / "whole").mkdir()
        (tmp_path / "parts").mkdir()
        whole = train(family, tmp_path / "whole", vae, config)
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(family, loss=interrupted), tmp_path / "parts", vae, config)
        parts = train(family, tmp_path / "parts", vae, config)
    pairs = zip(whole.transformer.parameters(), parts.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.transformer.proj_out_1.weight.any(), "nothing was learned"


def test_an_unknown_family_raises():
    with pytest.raises(ValueError, match="one of flux"):
        small_family("sd4")


def test_the_training_record_shows_sizes_losses_and_accuracy(pipelines):
    records = [{"step": s, "minutes": s / 100, "loss": 1 / s} for s in range(20, 301, 20)]
    rows = [{"split": "test", "steps": 50, "guidance_scale": 1.0, "attributes": 0.9, "whole": 0.5}]
    own = {"attributes": 1.0, "whole": 0.99}
    document = training_document(pipelines["dit"], records, rows, 29.1, own)
    count = sum(p.numel() for p in pipelines["dit"].transformer.parameters()) / 1e6
    assert f"| transformer | DiTTransformer2DModel | {count:.2f} M |" in document
    mean = sum(1 / s for s in (220, 240, 260, 280, 300)) / 5
    assert f"| 300 | 3 | {mean:.3f} |" in document
    assert "| test | 50 | 1 | 0.900 | 0.500 |" in document
