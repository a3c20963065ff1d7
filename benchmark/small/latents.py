"""Encoded examples on disk, and the noise levels that flow matching trains at."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmark.small.checkpoints import load_state, save_atomic


def load_encoded(
    path: Path,
    number: int,
    seed: int,
    draw: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = 200,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws and encodes examples, or reads what an earlier call left in `path`.

    Args:
        path: the file.
        number: how many examples.
        seed: of the drawing.
        draw: number, generator -> pictures or clips, and their label rows.
        encode: pictures or clips -> latents.
        chunk: how many examples are drawn at once.

    Returns:
        Latents float16 [number, ...] and label rows int64 [number, columns], on the CPU.
    """
    if not path.exists():
        latents, labels = [], []
        generator = torch.Generator().manual_seed(1000 + seed)
        for first in tqdm(range(0, number, chunk), desc="latents"):
            drawn, rows = draw(min(chunk, number - first), generator)
            latents.append(encode(drawn).half().cpu())
            labels.append(rows)
        save_atomic({"latents": torch.cat(latents), "labels": torch.cat(labels)}, path)
    state = load_state(path)
    return state["latents"], state["labels"]


def sample_sigmas(
    number: int, generator: torch.Generator, dwell_above: float = 0.6
) -> torch.Tensor:
    """Noise levels in (0, 1): half uniform above 0.6, 35 % logit-normal, 15 % uniform.

    The objects' shapes are decided above 0.6: there the loss tells a prompt from the same prompt
    with another shape, and below it hardly does. The rest is the density of Esser et al.,
    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, with mean 0.2
    and deviation 1, mixed with a uniform share. All three are stratified over the batch.
    `dwell_above` replaces the 0.6 for other examples than pictures.
    """
    uniform = stratified(number, generator)
    logit_normal = torch.sigmoid(0.2 + torch.special.ndtri(uniform))
    dwelling = dwell_above + (1 - dwell_above) * uniform
    kind = torch.rand(number, generator=generator)
    return torch.where(kind < 0.5, dwelling, torch.where(kind < 0.85, logit_normal, uniform))


def stratified(number: int, generator: torch.Generator) -> torch.Tensor:
    """One uniform number from each of `number` equal parts of (0, 1), in random order."""
    uniform = (torch.randperm(number, generator=generator) + 0.5) / number
    uniform = uniform + (torch.rand(number, generator=generator) - 0.5) / number
    return uniform.clamp(1e-4, 1 - 1e-4)
