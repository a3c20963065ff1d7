"""The transformer's training data: packed latents, token ids, and batches of noisy latents."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from tqdm.auto import tqdm

from benchmark.small.autoencoder import encode_pictures, training_pictures
from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.flux import pack_latents, tokenise, tokenise_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's tensors."""

    noisy: torch.Tensor
    """x_sigma = (1 - sigma) x_0 + sigma noise, [B, 64, 4 C]."""

    velocity: torch.Tensor
    """The target, noise - x_0, [B, 64, 4 C]."""

    sigma: torch.Tensor
    """Noise levels in (0, 1), [B]."""

    clip_ids: torch.Tensor
    """CLIP token ids, [B, 24]."""

    t5_ids: torch.Tensor
    """T5 token ids, [B, 24]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSet:
    """Encoded pictures with the token ids of their prompts."""

    latents: torch.Tensor
    """Packed latents, float16 [N, 64, 4 C]."""

    ids: tuple[torch.Tensor, torch.Tensor]
    """CLIP and T5 token ids, each [N, 24]."""

    empty_ids: tuple[torch.Tensor, torch.Tensor]
    """Both kinds of token ids of the empty prompt, each [1, 24]."""

    def batch(
        self, size: int, empty_share: float, generator: torch.Generator, device: str
    ) -> Batch:
        """Draws pictures, noise and noise levels; `empty_share` of the prompts become empty."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, 1, generator=generator) < empty_share
        clip_ids, t5_ids = (
            torch.where(dropped, empty, ids[chosen]).to(device)
            for empty, ids in zip(self.empty_ids, self.ids, strict=True)
        )
        clean = self.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sample_sigmas(size, generator)
        return Batch(
            noisy=torch.lerp(clean, noise, sigma.view(-1, 1, 1)).to(device),
            velocity=(noise - clean).to(device),
            sigma=sigma.to(device),
            clip_ids=clip_ids,
            t5_ids=t5_ids,
        )


def load_latent_set(
    pipeline: FluxPipeline, vae: AutoencoderKL, number: int, seed: int, path: Path
) -> LatentSet:
    """Draws and encodes `number` pictures, or reads what an earlier call left in `path`."""
    if not path.exists():
        latents, labels = [], []
        generator = torch.Generator().manual_seed(1000 + seed)
        for first in tqdm(range(0, number, 200), desc="latents"):
            pictures, rows = training_pictures(min(200, number - first), generator)
            parts = [encode_pictures(vae, part) for part in pictures.split(50)]
            latents.append(pack_latents(torch.cat(parts)).half().cpu())
            labels.append(rows)
        save_atomic({"latents": torch.cat(latents), "labels": torch.cat(labels)}, path)
    state = load_state(path)
    return LatentSet(
        latents=state["latents"],
        ids=tokenise_labels(pipeline, state["labels"]),
        empty_ids=tokenise(pipeline, [""]),
    )


def sample_sigmas(number: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in (0, 1): half uniform above 0.6, 35 % logit-normal, 15 % uniform.

    The objects' shapes are decided above 0.6: there the loss tells a prompt from the same prompt
    with another shape, and below it hardly does. The rest is the density of Esser et al.,
    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024, with mean 0.2
    and deviation 1, mixed with a uniform share. All three are stratified over the batch.
    """
    uniform = (torch.randperm(number, generator=generator) + 0.5) / number
    uniform = uniform + (torch.rand(number, generator=generator) - 0.5) / number
    uniform = uniform.clamp(1e-4, 1 - 1e-4)
    logit_normal = torch.sigmoid(0.2 + torch.special.ndtri(uniform))
    kind = torch.rand(number, generator=generator)
    return torch.where(
        kind < 0.5, 0.6 + 0.4 * uniform, torch.where(kind < 0.85, logit_normal, uniform)
    )
