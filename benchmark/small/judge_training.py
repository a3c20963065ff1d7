"""Trains the judge on raw and on reconstructed pictures."""

import logging
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.autoencoder import decode_latents, encode_pictures, training_pictures
from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.judge import Judge, label_accuracy
from benchmark.small.pictures import render
from benchmark.small.scenes import sample_labels
from benchmark.small.text import label_loss

logger = logging.getLogger(__name__)


def train_judge(
    work_dir: Path,
    vae: AutoencoderKL,
    steps: int = 1000,
    batch_size: int = 96,
    reconstructions: int = 2000,
    seed: int = 3,
) -> Judge:
    """Trains the judge on the CPU, or loads the finished one from `work_dir/judge.pt`.

    Three quarters of a batch are fresh raw pictures, the rest reconstructions by the autoencoder
    (of slightly disturbed latents); all of them get slight noise.
    """
    torch.manual_seed(seed)
    judge, checkpoint = Judge(), work_dir / "judge.pt"
    if checkpoint.exists():
        judge.load_state_dict(load_state(checkpoint))
        return judge.eval().requires_grad_(False)
    decoded, decoded_labels = _reconstructions(vae, reconstructions, seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc="judge")
    for step in progress:
        raw, raw_labels = training_pictures(batch_size * 3 // 4, generator)
        chosen = torch.randint(len(decoded), (batch_size - len(raw),), generator=generator)
        images = torch.cat([raw, decoded[chosen].float()])
        labels = torch.cat([raw_labels, decoded_labels[chosen]])
        strength = 0.05 * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
        loss = label_loss(judge.logits(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    if not math.isfinite(loss.item()):
        raise RuntimeError("the judge's training diverged")
    save_atomic(judge.state_dict(), checkpoint)
    return judge.eval().requires_grad_(False)


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


def _reconstructions(
    vae: AutoencoderKL, number: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    pictures, labels = training_pictures(number, generator)
    decoded = []
    for part in tqdm(pictures.split(50), desc="reconstructions"):
        latents = encode_pictures(vae, part)
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        decoded.append(decode_latents(vae, latents).half())
    return torch.cat(decoded), labels
