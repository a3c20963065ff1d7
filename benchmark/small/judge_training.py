"""Trains the judges, of pictures or of clips, on raw and on reconstructed examples."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.autoencoder import decode_latents, encode_pictures, training_pictures
from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.judge import Judge, label_accuracy
from benchmark.small.pictures import render
from benchmark.small.scenes import CHOICES, sample_labels
from benchmark.small.text import label_loss

Examples = tuple[torch.Tensor, torch.Tensor]
"""Pictures or clips, and their label rows."""


def train_judge(
    work_dir: Path,
    vae: AutoencoderKL,
    steps: int = 1000,
    batch_size: int = 96,
    reconstructions: int = 2000,
    seed: int = 3,
) -> Judge:
    """Trains the judge on the CPU, or loads the finished one from `work_dir/judge.pt`."""
    torch.manual_seed(seed)
    judge, checkpoint = Judge(), work_dir / "judge.pt"
    if checkpoint.exists():
        judge.load_state_dict(load_state(checkpoint))
        return judge.eval().requires_grad_(False)
    decoded = _reconstructions(vae, reconstructions, seed)
    generator = torch.Generator().manual_seed(seed)
    fit_judge(judge, training_pictures, decoded, CHOICES, steps, batch_size, generator)
    save_atomic(judge.state_dict(), checkpoint)
    return judge.eval().requires_grad_(False)


def fit_judge(
    judge: nn.Module,
    draw: Callable[[int, torch.Generator], Examples],
    decoded: Examples,
    choices: Sequence[int],
    steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Trains a judge with heads of so many ``choices``.

    Three quarters of a batch are fresh raw examples that `draw` gives, the rest of those `decoded`
    by the autoencoder (from slightly disturbed latents); all of them get slight noise.
    """
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = tqdm(range(steps), desc=type(judge).__name__)
    for step in progress:
        raw, raw_labels = draw(batch_size * 3 // 4, generator)
        chosen = torch.randint(len(decoded[0]), (batch_size - len(raw),), generator=generator)
        examples = torch.cat([raw, decoded[0][chosen].float()])
        labels = torch.cat([raw_labels, decoded[1][chosen]])
        each = (len(examples), *[1] * (examples.ndim - 1))
        strength = 0.05 * torch.rand(each, generator=generator)
        examples = examples + strength * torch.randn(examples.shape, generator=generator)
        loss = label_loss(judge.logits(examples), labels, choices)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the training of {type(judge).__name__} diverged")


def judge_accuracy(
    judge: Judge, number: int = 2000, seed: int = 11, vae: AutoencoderKL | None = None
) -> dict[str, float]:
    """Accuracy on fresh pictures of any scene, after the autoencoder where one is given."""
    generator = torch.Generator().manual_seed(seed)
    labels = sample_labels(number, generator)
    images = render(labels, generator)
    if vae is not None:
        parts = [decode_latents(vae, encode_pictures(vae, part)) for part in images.split(50)]
        images = torch.cat(parts)
    return label_accuracy(judge.predict(images), labels)


def _reconstructions(vae: AutoencoderKL, number: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(100 + seed)
    pictures, labels = training_pictures(number, generator)
    decoded = []
    for part in tqdm(pictures.split(50), desc="reconstructions"):
        latents = encode_pictures(vae, part)
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        decoded.append(decode_latents(vae, latents).half())
    return torch.cat(decoded), labels
