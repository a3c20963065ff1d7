"""The small Wan autoencoder: shapes, statistics of the latents, and its training."""

import pytest
import torch

from benchmark.small import autoencoder, clip_autoencoder, stages
from benchmark.small.clip_autoencoder import (
    build_clip_autoencoder,
    decode_clips,
    encode_clips,
    refine_decoder,
    train_autoencoder,
    training_clips,
)
from benchmark.small.families import small_family


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An autoencoder after three steps, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(clip_autoencoder, "FITTED_CLIPS", 2)
        patch.setattr(autoencoder, "_save_reconstructions", lambda *arguments: None)
        torch.manual_seed(0)
        yield train_autoencoder(folder, 3, batch_size=1), folder


def test_17_frames_become_5_latents_and_17_frames_again(trained):
    clips = training_clips(1, torch.Generator().manual_seed(1), 17)
    latents = encode_clips(trained[0], clips)
    assert latents.shape == (1, 16, 5, 8, 8)
    decoded = decode_clips(trained[0], latents)
    assert decoded.shape == clips.shape
    assert decoded.min() >= 0 and decoded.max() <= 1


def test_the_first_latent_is_of_the_first_frame_alone(trained):
    clips = training_clips(2, torch.Generator().manual_seed(1), 9)
    first = encode_clips(trained[0], clips[:, :1])
    assert torch.allclose(encode_clips(trained[0], clips)[:, :, :1], first, atol=1e-5)


def test_the_transformers_latents_have_unit_variance(trained):
    clips = training_clips(2, torch.Generator().manual_seed(7), 17)  # those it was fitted to
    channels = encode_clips(trained[0], clips).transpose(0, 1).flatten(1)
    assert channels.mean(dim=1).abs().max() < 1e-3
    assert (channels.std(dim=1) - 1).abs().max() < 1e-3


def test_the_statistics_are_those_that_the_pipeline_reads(trained):
    model = trained[0]
    clips = training_clips(1, torch.Generator().manual_seed(1), 5)
    raw = model.encode(2 * clips.transpose(1, 2) - 1).latent_dist.mean
    mean, std = (torch.tensor(model.config[name]) for name in ("latents_mean", "latents_std"))
    expected = (raw - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    assert torch.allclose(encode_clips(model, clips), expected, atol=1e-5)


def test_a_trained_autoencoder_is_read_again(trained):
    model, folder = trained
    torch.manual_seed(5)
    again = train_autoencoder(folder, 3)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.config.latents_std == model.config.latents_std


def test_a_refined_decoder_leaves_the_latents_as_they_are(trained, tmp_path):
    torch.manual_seed(0)
    model = build_clip_autoencoder().eval().requires_grad_(False)
    clips = training_clips(1, torch.Generator().manual_seed(1), 5)
    before, decoded = encode_clips(model, clips), decode_clips(model, encode_clips(model, clips))
    with torch.enable_grad():
        refine_decoder(model, tmp_path, 1, batch_size=1)
    assert torch.equal(encode_clips(model, clips), before)
    assert not torch.equal(decode_clips(model, before), decoded)


def test_training_clips_show_no_held_back_motion(monkeypatch):
    seen = []
    monkeypatch.setattr(clip_autoencoder, "render_clips", lambda labels, *rest: seen.append(labels))
    training_clips(1000, torch.Generator().manual_seed(0), 9)
    held_back = {tuple(row) for row in clip_autoencoder.held_back_motions("wan").tolist()}
    assert held_back.isdisjoint(tuple(row) for row in seen[0].tolist())


def test_a_missing_judge_of_clips_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no judge in"):
        stages._judge(small_family("wan"), tmp_path, build_clip_autoencoder(), tmp_path / "none")


def test_what_is_trained_is_what_is_decoded_but_for_the_clamp(trained):
    latents = 3 * torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = clip_autoencoder.decode_unclamped(trained[0], latents)
    assert raw.abs().max() > 1
    assert torch.allclose(raw.clamp(-1, 1), trained[0].decode(latents).sample, atol=1e-5)


def test_an_untrained_autoencoder_takes_every_chunk_of_a_clip_as_its_last_frame():
    torch.manual_seed(0)
    model = build_clip_autoencoder().eval()
    clips = training_clips(1, torch.Generator().manual_seed(1), 9)
    latents = encode_clips(model, clips)
    frames = encode_clips(model, clips[0, ::4].unsqueeze(1))  # 0, 4, 8: three clips of one frame
    assert torch.allclose(latents[0].transpose(0, 1), frames[:, :, 0], atol=1e-4)
    decoded = decode_clips(model, latents)
    assert torch.allclose(decoded[:, 1:5], decoded[:, 4:5].expand(-1, 4, -1, -1, -1), atol=1e-5)
