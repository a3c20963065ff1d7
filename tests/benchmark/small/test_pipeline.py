"""The shipped FLUX pipeline and judge, and the pieces that they are made of."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from benchmark.small.evaluation import draw_loss, split_accuracy
from benchmark.small.flux import FAMILY, build_transformer, image_ids, pack_latents
from benchmark.small.judge import label_accuracy, load_judge
from benchmark.small.judge_training import judge_accuracy
from benchmark.small.latents import sample_sigmas
from benchmark.small.pictures import render
from benchmark.small.scenes import labels_scene, sample_labels
from benchmark.small.splits import read_split
from benchmark.small.tokenizers import WORDS, build_clip_tokenizer, build_t5_tokenizer
from benchmark.small.training import TrainingConfig

PIPELINES = Path(__file__).parents[3] / "benchmark" / "pipelines"
LONGEST = "a purple triangle and a yellow triangle on a white checkered background"


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(PIPELINES / "flux", local_files_only=True)


@pytest.fixture(scope="module")
def judge():
    return load_judge(PIPELINES / "judge")


def test_every_word_is_one_token():
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(word).input_ids) == 2, word
    assert len(clip(LONGEST).input_ids) <= 24
    assert len(t5(LONGEST).input_ids) <= 24


def test_packing_matches_the_pipelines_positions():
    latents = torch.arange(2 * 8 * 16 * 16, dtype=torch.float32).view(2, 8, 16, 16)
    packed = pack_latents(latents)
    assert packed.shape == (2, 64, 32)
    assert image_ids(16, 16).shape == (64, 3)
    first_patch = latents[0, :, :2, :2].flatten()
    assert torch.equal(packed[0, 0].sort().values, first_patch.sort().values)


def test_an_untrained_transformer_predicts_zero():
    transformer = build_transformer()
    prediction = transformer(
        hidden_states=torch.randn(1, 64, 32),
        encoder_hidden_states=torch.randn(1, 24, 64),
        pooled_projections=torch.randn(1, 64),
        timestep=torch.tensor([0.5]),
        img_ids=image_ids(16, 16),
        txt_ids=torch.zeros(24, 3),
        return_dict=False,
    )[0]
    assert torch.equal(prediction, torch.zeros(1, 64, 32))


def test_noise_levels_lie_inside_the_unit_interval_and_cover_it():
    sigmas = sample_sigmas(4096, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0 and sigmas.max() < 1
    assert (sigmas < 0.1).any() and (sigmas > 0.9).any()
    # 0.5 * mean above 0.6, and the logit-normal and uniform shares around 0.54 and 0.5.
    assert 0.65 < sigmas.mean() < 0.68
    assert (sigmas > 0.6).float().mean() > 0.65


def test_a_budget_without_an_end_raises():
    with pytest.raises(ValueError, match="minutes and steps"):
        TrainingConfig(minutes=None, steps=None)


def test_the_budget_that_runs_out_first_ends_the_training():
    config = TrainingConfig(minutes=10, steps=100)
    assert config.fraction(50, 0.0) == 0.5
    assert config.fraction(50, 540.0) == pytest.approx(0.9)


def test_the_loss_is_drawn_as_a_picture_file(tmp_path):
    draw_loss([{"step": 20, "loss": 0.9}, {"step": 40, "loss": 0.4}], tmp_path / "loss.svg")
    assert "training step" in (tmp_path / "loss.svg").read_text()


def test_the_pipeline_loads_in_float32(pipeline):
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        assert {p.dtype for p in getattr(pipeline, name).parameters()} == {torch.float32}, name


@pytest.mark.parametrize(
    "name", ["flux", "dit", "pixart", "opensora", "sd", "sd3", "judge", "clip_judge"]
)
def test_what_is_shipped_is_small(name):
    files = [path for path in (PIPELINES / name).rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) < 13 * 2**20


def test_the_guidance_of_the_empty_prompt_changes_the_picture(pipeline):
    options = {
        "prompt": LONGEST,
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "max_sequence_length": 24,
        "output_type": "pt",
    }
    plain, guided = (
        pipeline(**options, **extra, generator=torch.Generator().manual_seed(0)).images
        for extra in ({}, {"negative_prompt": "", "true_cfg_scale": 3.0})
    )
    assert plain.shape == (1, 3, 64, 64)
    assert not torch.equal(plain, guided)


def test_a_seed_decides_the_picture(pipeline):
    pictures = FAMILY.generate(pipeline, [LONGEST] * 3, [1, 1, 2], steps=2)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-2)


def test_the_autoencoder_reconstructs_fresh_pictures(pipeline):
    generator = torch.Generator().manual_seed(17)
    pictures = render(sample_labels(32, generator), generator)
    vae = pipeline.vae
    latents = vae.encode(2 * pictures - 1).latent_dist.mean
    decoded = vae.decode(latents).sample.div(2).add(0.5).clamp(0, 1)
    psnr = -10 * (decoded - pictures).square().mean((1, 2, 3)).log10().mean()
    assert psnr > 28
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert scaled.std() == pytest.approx(1, abs=0.1)


def test_pictures_of_held_back_prompts_show_their_scene(pipeline, judge):
    accuracy = split_accuracy(FAMILY, pipeline, judge, "test", steps=20, number=12)
    assert accuracy["attributes"] > 0.95
    assert accuracy["whole"] > 0.85


def test_the_judge_is_right_about_fresh_pictures(judge):
    accuracy = judge_accuracy(judge, number=500, seed=12345)
    assert accuracy["attributes"] > 0.98
    assert accuracy["whole"] > 0.95


def test_the_judge_counts_attributes_and_whole_prompts(judge):
    generator = torch.Generator().manual_seed(8)
    labels = sample_labels(64, generator)
    images = render(labels, generator)
    prompts = [labels_scene(row).prompt for row in labels]
    right = judge.prompt_accuracy(images, prompts)
    shuffled = judge.prompt_accuracy(images, prompts[1:] + prompts[:1])
    assert right["whole"] > 0.9
    assert shuffled["whole"] < 0.1
    assert shuffled["attributes"] < 0.6


def test_label_accuracy_ignores_what_the_prompt_does_not_name():
    wanted = torch.tensor([[0, 1, 2, -1, -1, 3, 1]])
    found = torch.tensor([[1, 1, 2, 3, 4, 3, 1]])
    assert label_accuracy(found, wanted) == {"attributes": pytest.approx(0.8), "whole": 0.0}


def test_the_judge_takes_bytes_as_well_as_floats(judge):
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(judge(images), judge(images / 255), atol=1e-5)
    assert judge.features(images / 255).shape == (4, judge.num_features)


def test_the_judge_serves_as_feature_network_of_a_fid(judge):
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(feature=judge)
    generator = torch.Generator().manual_seed(4)
    pictures = render(sample_labels(256, generator), generator)
    metric.update(pictures[:128], real=True)
    metric.update(pictures[128:], real=False)
    near = metric.compute()
    metric.reset()
    metric.update(pictures[:128], real=True)
    metric.update(torch.rand(128, 3, 64, 64, generator=generator), real=False)
    assert 0 <= near < metric.compute() / 5


def test_the_judge_names_what_is_wrong_with_its_arguments(judge, tmp_path):
    with pytest.raises(ValueError, match="images must be"):
        judge(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="do not match"):
        judge.prompt_accuracy(torch.zeros(2, 3, 64, 64), [read_split("test")[0]["prompt"]])
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_judge(tmp_path)


def test_the_training_script_explains_itself(monkeypatch, capsys):
    script = Path(__file__).parents[3] / "scripts" / "train_small.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "--work-dir" in capsys.readouterr().out
