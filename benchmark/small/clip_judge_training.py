"""Trains the judge of clips on raw and on reconstructed clips."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmark.small.autoencoder import decode_latents, encode_pictures
from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.clips import render_clips
from benchmark.small.judge import Judge, label_accuracy
from benchmark.small.judge_training import Examples, fit_judge
from benchmark.small.motion import CHOICES, sample_labels
from benchmark.small.splits import held_back_motions


def train_clip_judge(
    work_dir: Path,
    vae: AutoencoderKL,
    picture_judge: Judge,
    steps: int = 600,
    batch_size: int = 24,
    reconstructions: int = 96,
    seed: int = 4,
) -> ClipJudge:
    """Trains the judge on the CPU, or loads the finished one from `work_dir/clip_judge.pt`.

    Its convolutions start as the picture judge's.
    """
    torch.manual_seed(seed)
    judge, checkpoint = ClipJudge(**picture_judge.config), work_dir / "clip_judge.pt"
    if checkpoint.exists():
        judge.load_state_dict(load_state(checkpoint))
        return judge.eval().requires_grad_(False)
    judge.start_from(picture_judge)
    held_back = held_back_motions()

    def draw(number: int, generator: torch.Generator) -> Examples:
        labels = sample_labels(number, generator, exclude=held_back)
        return render_clips(labels, generator), labels

    generator = torch.Generator().manual_seed(seed)
    clips, labels = draw(reconstructions, generator)
    decoded = reconstruct(vae, clips, generator), labels
    fit_judge(judge, draw, decoded, CHOICES, steps, batch_size, generator)
    save_atomic(judge.state_dict(), checkpoint)
    return judge.eval().requires_grad_(False)


def clip_judge_accuracy(
    judge: ClipJudge, number: int = 300, seed: int = 11, vae: AutoencoderKL | None = None
) -> dict[str, float]:
    """Accuracy on fresh clips of any scene, after the autoencoder where one is given."""
    generator = torch.Generator().manual_seed(seed)
    found, labels = [], sample_labels(number, generator)
    for rows in labels.split(50):
        clips = render_clips(rows, generator)
        found.append(judge.predict(clips if vae is None else reconstruct(vae, clips)))
    return label_accuracy(torch.cat(found), labels)


def reconstruct(
    vae: AutoencoderKL, clips: torch.Tensor, disturb: torch.Generator | None = None
) -> torch.Tensor:
    """Clips [N, 16, 3, 64, 64] after the autoencoder, float16; `disturb` adds 10 % of noise."""
    decoded = []
    for frames in clips.flatten(0, 1).split(64):
        latents = encode_pictures(vae, frames).cpu()
        if disturb is not None:
            latents = latents + 0.1 * torch.randn(latents.shape, generator=disturb)
        decoded.append(decode_latents(vae, latents).half())
    return torch.cat(decoded).unflatten(0, clips.shape[:2])
