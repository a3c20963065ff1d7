"""Trains the judges, of pictures or of clips, on raw and on reconstructed examples."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm.auto import tqdm

from benchmark.small import motion, scenes
from benchmark.small.autoencoder import decode_latents, encode_pictures, training_pictures
from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.clips import render_clips
from benchmark.small.judge import Classifier, Judge, label_accuracy
from benchmark.small.pictures import render
from benchmark.small.splits import held_back_motions
from benchmark.small.text import label_loss

Examples = tuple[torch.Tensor, torch.Tensor]
"""Pictures or clips, and their label rows."""
Draw = Callable[[int, torch.Generator], Examples]


def train_judge(work_dir: Path, vae: AutoencoderKL, steps: int = 1000, seed: int = 3) -> Judge:
    """Trains the judge of pictures, or loads the finished one from `work_dir/judge.pt`."""
    torch.manual_seed(seed)
    sizes = {"steps": steps, "batch_size": 96, "reconstructions": 2000, "seed": seed}
    return _trained(Judge(), work_dir / "judge.pt", training_pictures, vae, **sizes)


def train_clip_judge(
    work_dir: Path, vae: AutoencoderKL, picture_judge: Judge, steps: int = 600, seed: int = 4
) -> ClipJudge:
    """Trains the judge of clips, or loads the finished one from `work_dir/clip_judge.pt`.

    Its convolutions start as the picture judge's.
    """
    torch.manual_seed(seed)
    judge, held_back = ClipJudge(**picture_judge.config), held_back_motions()
    judge.start_from(picture_judge)

    def draw(number: int, generator: torch.Generator) -> Examples:
        labels = motion.sample_labels(number, generator, exclude=held_back)
        return render_clips(labels, generator), labels

    sizes = {"steps": steps, "batch_size": 24, "reconstructions": 96, "seed": seed}
    return _trained(judge, work_dir / "clip_judge.pt", draw, vae, **sizes)


def _trained(
    judge: Classifier,
    checkpoint: Path,
    draw: Draw,
    vae: AutoencoderKL,
    *,
    steps: int,
    batch_size: int,
    reconstructions: int,
    seed: int,
) -> Classifier:
    """The judge trained on the CPU, or as the checkpoint has it.

    Three quarters of a batch are fresh raw examples that `draw` gives, the rest some of so many
    `reconstructions` by the autoencoder (from slightly disturbed latents); all get slight noise.
    """
    if checkpoint.exists():
        judge.load_state_dict(load_state(checkpoint))
        return judge.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    examples, decoded_labels = draw(reconstructions, generator)
    decoded = reconstruct(vae, examples, generator).half()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = tqdm(range(steps), desc=type(judge).__name__)
    for step in progress:
        raw, raw_labels = draw(batch_size * 3 // 4, generator)
        chosen = torch.randint(len(decoded), (batch_size - len(raw),), generator=generator)
        examples = torch.cat([raw, decoded[chosen].float()])
        labels = torch.cat([raw_labels, decoded_labels[chosen]])
        each = (len(examples), *[1] * (examples.ndim - 1))
        strength = 0.05 * torch.rand(each, generator=generator)
        examples = examples + strength * torch.randn(examples.shape, generator=generator)
        loss = label_loss(judge.logits(examples), labels, judge.choices)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the training of {type(judge).__name__} diverged")
    save_atomic(judge.state_dict(), checkpoint)
    return judge.eval().requires_grad_(False)


def judge_accuracy(
    judge: Classifier, number: int = 2000, seed: int = 11, vae: AutoencoderKL | None = None
) -> dict[str, float]:
    """Accuracy on fresh pictures or clips of any scene, after the autoencoder if one is given."""
    generator = torch.Generator().manual_seed(seed)
    clips = isinstance(judge, ClipJudge)
    sample, draw = (motion.sample_labels, render_clips) if clips else (scenes.sample_labels, render)
    labels, found = sample(number, generator), []
    for rows in labels.split(50):
        examples = draw(rows, generator)
        found.append(judge.predict(examples if vae is None else reconstruct(vae, examples)))
    return label_accuracy(torch.cat(found), labels)


def reconstruct(
    vae: AutoencoderKL, examples: torch.Tensor, disturb: torch.Generator | None = None
) -> torch.Tensor:
    """Pictures or clips after the autoencoder; `disturb` adds 10 % of noise to their latents."""
    decoded = []
    for pictures in examples.reshape(-1, *examples.shape[-3:]).split(50):
        latents = encode_pictures(vae, pictures).cpu()
        if disturb is not None:
            latents = latents + 0.1 * torch.randn(latents.shape, generator=disturb)
        decoded.append(decode_latents(vae, latents))
    return torch.cat(decoded).reshape(examples.shape)
