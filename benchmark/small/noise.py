"""Noise prediction with linear betas, which PixArt and DiT are trained with."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler

from benchmark.small.latents import stratified

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
"""Options of the schedulers."""

SCHEDULER = DDPMScheduler(**BETAS)

HIGHEST_WEIGHT = 40.0
"""Bound of `loss_weights`, reached at timestep 602: the unbounded weight grows to 25 000."""

DWELL = (300, 800)
"""Timesteps that decide the shapes: noise is 1.2 to 25 times as strong as the picture."""


def sample_timesteps(number: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps, int64 [number]: half of them from `DWELL`, half from all, both stratified."""
    dwelling = number // 2
    low, high = DWELL
    parts = [
        low + (high - low) * stratified(dwelling, generator),
        BETAS["num_train_timesteps"] * stratified(number - dwelling, generator),
    ]
    return torch.cat(parts).long()


def loss_weights(timesteps: torch.Tensor) -> torch.Tensor:
    """Weights of the squared error of the noise, 1 / a_t bounded by `HIGHEST_WEIGHT`.

    a_t, of `SCHEDULER.alphas_cumprod`, is the share of the picture's variance at a timestep.

    The noise's error is sqrt(a_t) times the velocity's (Salimans and Ho, "Progressive Distillation
    for Fast Sampling of Diffusion Models", 2022), so that this is the velocity's squared error.
    Unweighted, high noise counts for almost nothing, and there the shapes are decided.
    """
    return (1 / SCHEDULER.alphas_cumprod[timesteps]).clamp(max=HIGHEST_WEIGHT)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseBatch:
    """One step's tensors."""

    noisy: torch.Tensor
    """x_t, [B, C, H, W]."""

    noise: torch.Tensor
    """The target, [B, C, H, W]."""

    timesteps: torch.Tensor
    """int64 [B]."""

    weights: torch.Tensor
    """The loss's weights, [B]."""

    conditions: torch.Tensor
    """int64 [B, ...]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseExamples:
    """Encoded pictures with their conditions."""

    latents: torch.Tensor
    """float16 [N, C, H, W]."""

    conditions: torch.Tensor
    """Token ids, int64 [N, L], or class ids, [N]."""

    empty: torch.Tensor
    """The empty prompt's token ids, [L], or the null class, []."""

    def batch(
        self, size: int, empty_share: float, generator: torch.Generator, device: str
    ) -> NoiseBatch:
        """Draws pictures, noise and timesteps; `empty_share` of the conditions become empty."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < empty_share
        clean = self.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = sample_timesteps(size, generator)
        conditions = self.conditions[chosen]
        conditions[dropped] = self.empty
        return NoiseBatch(
            noisy=SCHEDULER.add_noise(clean, noise, timesteps).to(device),
            noise=noise.to(device),
            timesteps=timesteps.to(device),
            weights=loss_weights(timesteps).to(device),
            conditions=conditions.to(device),
        )


def noise_loss(prediction: torch.Tensor, batch: NoiseBatch) -> torch.Tensor:
    """Weighted squared error of the noise [N, C, H, W] in the first C of 2 C predicted channels.

    The other half, the learned variance of the published models, is not trained: the pipelines
    leave it out of what they give to their schedulers.
    """
    error = prediction[:, : batch.noise.shape[1]] - batch.noise
    return (batch.weights * error.square().mean((1, 2, 3))).mean()
