"""The small Wan autoencoder: clips of 4k + 1 frames of 64x64 to k + 1 latents of 8x8."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    unpatchify,
)
from torch import nn

from benchmark.small.autoencoder import train_reconstruction
from benchmark.small.clips import render_clips
from benchmark.small.motion import sample_labels
from benchmark.small.splits import held_back_motions

CHANNELS = 16
TRAINING_FRAMES = 9
"""Three latents: the first, and two that see what lies before them."""
PICTURE_SHARE = 0.5
FITTED_CLIPS = 64
"""So many give the latents' statistics."""


def build_clip_autoencoder() -> AutoencoderKLWan:
    """An untrained AutoencoderKLWan with 1.9 M parameters, 8x and in time 4x downsampling.

    As in Wan 2.2 patches of 2x2 pixels go in.
    """
    model = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    _start_as_pictures_(model)
    return model


@torch.no_grad()
def _start_as_pictures_(model: AutoencoderKLWan) -> None:
    """Starting values with which few steps suffice.

    Residual blocks and attention start as the identity. The other convolutions look at the last of
    their three frames alone, so that every frame of a clip is a picture at first, and keep the
    variance. The constant that goes in beside the signal tells the normalisation its length.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight
            last = weight[:, :, -1] if weight.ndim == 5 else weight
            nn.init.zeros_(weight)
            last.copy_(nn.init.kaiming_normal_(torch.empty_like(last), nonlinearity="linear"))
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight  # for one frame or two, [D or 2 D, D, 3, 1, 1]
            copies = len(weight) // weight.shape[1]
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)
    for part in (model.encoder, model.decoder):
        nn.init.normal_(part.conv_in.bias)


def training_clips(number: int, generator: torch.Generator, frames: int) -> torch.Tensor:
    """Clips [number, frames, 3, 64, 64] in [0, 1] outside Wan's test split."""
    labels = sample_labels(number, generator, exclude=held_back_motions("wan"))
    return render_clips(labels, generator, frames)


def _targets(number: int, generator: torch.Generator) -> torch.Tensor:
    """Clips, or by turns three times as many single frames: more scenes in less time."""
    if torch.rand((), generator=generator) < PICTURE_SHARE:
        clips = training_clips(3 * number, generator, TRAINING_FRAMES)
        frames = torch.randint(TRAINING_FRAMES, (len(clips),), generator=generator)
        return _pixels(clips[torch.arange(len(clips)), frames].unsqueeze(1))
    return _pixels(training_clips(number, generator, TRAINING_FRAMES))


def decode_unclamped(model: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `model.decode` returns for latents as they are, [N, 3, F, H, W], but not clamped.

    A clamped pixel of the wrong sign would have no gradient.
    """
    cached: list[torch.Tensor | None] = [None] * len(
        [part for part in model.decoder.modules() if isinstance(part, WanCausalConv3d)]
    )
    states = model.post_quant_conv(latents)
    frames = [
        model.decoder(
            states[:, :, index : index + 1],
            feat_cache=cached,
            feat_idx=[0],
            first_chunk=index == 0,
        )
        for index in range(states.shape[2])
    ]
    return unpatchify(torch.cat(frames, dim=2), model.config.patch_size)


def train_autoencoder(
    work_dir: Path, steps: int, batch_size: int = 3, seed: int = 0, device: str = "cpu"
) -> AutoencoderKLWan:
    """Trains the autoencoder, or resumes; the trained one is kept as `work_dir/clip_vae.pt`.

    As the one of pictures is trained, on clips of 9 frames and on single frames, with 4 % of noise.
    """
    model = build_clip_autoencoder().to(device)
    checkpoint = work_dir / "clip_vae.pt"
    train_reconstruction(
        model,
        model,
        checkpoint,
        _targets,
        steps,
        batch_size,
        seed,
        peak=2e-3,
        noise_share=0.04,
        decode=decode_unclamped,
    )
    _fit_latents(model, seed)
    return model.eval().requires_grad_(False)


def refine_decoder(
    model: AutoencoderKLWan, work_dir: Path, steps: int, batch_size: int = 3, seed: int = 1
) -> AutoencoderKLWan:
    """Trains the decoder alone for longer; resumes from, and is kept as, `clip_decoder.pt`."""
    decoder = nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)
    checkpoint = work_dir / "clip_decoder.pt"
    train_reconstruction(
        decoder,
        model,
        checkpoint,
        _targets,
        steps,
        batch_size,
        seed,
        peak=1e-3,
        noise_share=0.06,
        decode=decode_unclamped,
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_clips(
    model: AutoencoderKLWan, clips: torch.Tensor, batch_size: int = 20
) -> torch.Tensor:
    """Latents [N, 16, k + 1, 8, 8] of unit variance, as the transformer sees them.

    Args:
        model: the autoencoder.
        clips: [N, 4 k + 1, 3, 64, 64] in [0, 1].
        batch_size: how many are encoded at once.
    """
    device = next(model.parameters()).device
    means = [
        model.encode(_pixels(part).to(device)).latent_dist.mean for part in clips.split(batch_size)
    ]
    mean, std = _statistics(model, device)
    return (torch.cat(means) - mean) / std


@torch.no_grad()
def decode_clips(model: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips [N, 4 k + 1, 3, 64, 64] in [0, 1] of the transformer's latents, on the CPU."""
    device = next(model.parameters()).device
    mean, std = _statistics(model, device)
    decoded = model.decode(latents.to(device) * std + mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()


def reconstruction_psnr(model: AutoencoderKLWan, number: int = 32, seed: int = 99) -> float:
    """Mean PSNR in dB over the frames of fresh clips of 17 frames."""
    clips = training_clips(number, torch.Generator().manual_seed(seed), 17)
    error = torch.cat(
        [
            (decode_clips(model, encode_clips(model, part)) - part).square().mean((2, 3, 4))
            for part in clips.split(8)
        ]
    )
    return float((-10 * error.log10()).mean())


def _pixels(clips: torch.Tensor) -> torch.Tensor:
    """[N, 3, F, H, W] in [-1, 1]."""
    return 2 * clips.transpose(1, 2) - 1


def _statistics(model: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents' channels, [1, 16, 1, 1, 1]."""
    values = torch.tensor([model.config.latents_mean, model.config.latents_std], device=device)
    return tuple(values.view(2, 1, -1, 1, 1, 1))


@torch.no_grad()
def _fit_latents(model: AutoencoderKLWan, seed: int) -> None:
    """Sets the statistics so that every channel has zero mean and unit variance."""
    count = model.config.z_dim
    model.register_to_config(latents_mean=[0.0] * count, latents_std=[1.0] * count)
    clips = training_clips(FITTED_CLIPS, torch.Generator().manual_seed(seed + 7), 17)
    channels = encode_clips(model, clips).transpose(0, 1).flatten(1)
    model.register_to_config(
        latents_mean=[round(value, 5) for value in channels.mean(dim=1).tolist()],
        latents_std=[round(value, 5) for value in channels.std(dim=1).tolist()],
    )
