"""Between pixels and the latents of `OpenSoraPipeline`: sizes, autoencoders, known frames."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .rectified_flow import CHUNK_FRAMES, CHUNK_LATENTS, RectifiedFlowScheduler

SPATIAL_RATIO = 8
"""Pixels per latent without an autoencoder: that of Open-Sora's own."""
CHUNK_TEMPORAL_RATIO = 4
"""Frames per latent frame in what remains of a video after chunks of 17 frames."""

Generators = torch.Generator | list[torch.Generator] | None


def spatial_ratio(vae: nn.Module | None) -> int:
    """Pixels per latent along height and width."""
    if vae is None:
        return SPATIAL_RATIO
    names = ("spatial_compression_ratio", "scale_factor_spatial")
    for ratio in (vars(vae).get(names[0]), *(vae.config.get(name) for name in names)):
        if ratio:
            return int(ratio)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def temporal_ratio(vae: nn.Module) -> int | None:
    """Frames per latent frame of a video autoencoder; None for an image autoencoder."""
    names = ("temporal_compression_ratio", "scale_factor_temporal")
    found = [vars(vae).get(names[0]), *(vae.config.get(name) for name in names)]
    return next((int(ratio) for ratio in found if ratio and ratio > 1), None)


def latent_frames(num_frames: int, vae: nn.Module | None) -> int:
    """Latent frames of a video.

    Without an autoencoder those of Open-Sora's own: 5 for each 17 frames, a quarter (rounded up)
    of the rest. An image autoencoder makes one of each frame; a video autoencoder of ratio r one of
    the first frame and one of each further r.

    Raises:
        ValueError: If a video autoencoder cannot make ``num_frames`` frames.
    """
    if vae is None:
        chunks, rest = divmod(num_frames, CHUNK_FRAMES)
        return chunks * CHUNK_LATENTS + -(-rest // CHUNK_TEMPORAL_RATIO)
    ratio = temporal_ratio(vae)
    if ratio is None:
        return num_frames
    if (num_frames - 1) % ratio:
        raise ValueError(
            f"num_frames must be a multiple of {ratio} plus 1 for {type(vae).__name__}, "
            f"got {num_frames}"
        )
    return (num_frames - 1) // ratio + 1


def encode_video(vae: nn.Module, video: Tensor) -> Tensor:
    """Video ``[B, 3, F, H, W]`` in [-1, 1] -> latents ``[B, C, T, h, w]``, float32."""
    video = video.to(vae.dtype)
    if temporal_ratio(vae) is None:
        frames = video.transpose(1, 2)
        latents = vae.encode(frames.flatten(0, 1)).latent_dist.mode()
        latents = latents.unflatten(0, frames.shape[:2]).transpose(1, 2)
    else:
        latents = vae.encode(video).latent_dist.mode()
    scale, shift = latent_statistics(vae, latents)
    return ((latents - shift) / scale).float()


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents ``[B, C, T, h, w]`` -> video ``[B, 3, F, H, W]`` in [-1, 1]."""
    scale, shift = latent_statistics(vae, latents)
    latents = (latents * scale + shift).to(vae.dtype)
    if temporal_ratio(vae) is not None:
        return vae.decode(latents, return_dict=False)[0]
    frames = latents.transpose(1, 2)
    video = vae.decode(frames.flatten(0, 1), return_dict=False)[0]
    return video.unflatten(0, frames.shape[:2]).transpose(1, 2)


def latent_statistics(vae: nn.Module, latents: Tensor) -> tuple[Any, Any]:
    """``(scale, shift)`` such that the autoencoder's own latents are ``latents * scale + shift``.

    From the autoencoder's configuration: ``latents_std`` and ``latents_mean`` per channel, or
    ``shift_factor``; with ``scaling_factor``, each where it is set.
    """
    config = vae.config
    scale, shift = 1 / (config.get("scaling_factor") or 1.0), config.get("shift_factor") or 0.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        std, shift = (
            torch.tensor(config[name], device=latents.device, dtype=latents.dtype).reshape(
                1, -1, 1, 1, 1
            )
            for name in ("latents_std", "latents_mean")
        )
        scale = std * scale
    return scale, shift


@dataclass
class FrameConditioning:
    """Latent frames that are given, and from when on each is sampled too (Open-Sora 1.2's rule).

    A frame with mask m is active once ``1000 m >= t``: then it first gets noise of level t. A frame
    that is not active is shown to the model as known, and keeps its value.
    """

    mask: Tensor
    """``[B, T]`` in [0, 1]: 0 keeps a frame, 1 samples it from pure noise."""
    noisy: Tensor
    """Bool ``[B, T]``: frames that have been given noise."""

    @classmethod
    def start(
        cls, noise: Tensor, latents: Tensor, mask: Tensor | None
    ) -> tuple["FrameConditioning", Tensor]:
        """Conditioning and initial latents: ``noise`` where the mask is 1, else what is known.

        Args:
            noise: ``[B, C, T, h, w]``.
            latents: The first K frames, ``[n, C, K, h, w]``; n divides B and K is at most T.
            mask: ``[T]`` or ``[n, T]``; None: 0 for the K frames, 1 for the others.

        Raises:
            ValueError: If a shape does not fit, or if the mask leaves [0, 1].
        """
        batch_size, channels, num_frames, *size = noise.shape
        count, *shape = latents.shape if latents.ndim == 5 else (0,)
        fits = count and batch_size % count == 0 and shape[1] <= num_frames
        if not fits or [shape[0], *shape[2:]] != [channels, *size]:
            raise ValueError(
                f"conditioning_latents must have shape [n, {channels}, K, {size[0]}, {size[1]}] "
                f"with n dividing {batch_size} and K up to {num_frames}, got {list(latents.shape)}"
            )
        if mask is None:
            mask = (torch.arange(num_frames) >= shape[1]).float()
        mask = torch.as_tensor(mask, dtype=torch.float32, device=noise.device)
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.ndim != 2 or batch_size % len(mask) or mask.shape[1] != num_frames:
            raise ValueError(
                f"conditioning_mask must have shape [{num_frames}] or [n, {num_frames}] with n "
                f"dividing {batch_size}, got {list(mask.shape)}"
            )
        if mask.min() < 0 or mask.max() > 1:
            raise ValueError("conditioning_mask must lie in [0, 1]")
        mask = mask.repeat_interleave(batch_size // len(mask), 0)
        known = torch.zeros_like(noise)
        known[:, :, : shape[1]] = latents.to(noise).repeat_interleave(batch_size // count, 0)
        noisy = mask == 1
        return cls(mask, noisy), torch.where(over_frames(noisy), noise, known)

    def add_noise(
        self,
        latents: Tensor,
        timestep: Tensor,
        scheduler: RectifiedFlowScheduler,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """Return the latents with noise on newly active frames, and the active ones ``[B, T]``."""
        active = self.mask * scheduler.config.num_train_timesteps >= timestep
        # drawn at every step, so that no sample's noise depends on the others' masks
        noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        noised = scheduler.scale_noise(latents, timestep, noise)
        latents = torch.where(over_frames(active & ~self.noisy), noised, latents)
        self.noisy = self.noisy | active
        return latents, active


def over_frames(mask: Tensor) -> Tensor:
    """``[B, T]`` -> ``[B, 1, T, 1, 1]``, to select frames of latents."""
    return mask[:, None, :, None, None]
