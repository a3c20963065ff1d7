"""The small autoencoder: 64x64 pictures to 16x16 latents, trained for sharp reconstructions."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.checkpoints import load_state, save_atomic
from benchmark.small.grids import clip_rows, save_grid
from benchmark.small.pictures import SIZE, render
from benchmark.small.scenes import sample_labels
from benchmark.small.splits import held_back_labels

KL_WEIGHT = 1e-6

Draw = Callable[[int, torch.Generator], torch.Tensor]
"""How many, generator -> what an autoencoder encodes, in [-1, 1]."""


def build_autoencoder(latent_channels: int = 8) -> AutoencoderKL:
    """An untrained AutoencoderKL with 0.5 M parameters and 4x downsampling."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 56),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def training_pictures(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [number, 3, 64, 64] and label rows of scenes outside the test split."""
    labels = sample_labels(number, generator, exclude=held_back_labels())
    return render(labels, generator), labels


def _targets(number: int, generator: torch.Generator) -> torch.Tensor:
    pictures, _ = training_pictures(number, generator)
    return (2 * pictures - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    work_dir: Path, steps: int, batch_size: int = 8, seed: int = 0, device: str = "cpu"
) -> AutoencoderKL:
    """Trains the autoencoder, or resumes; the trained one is kept as `work_dir/vae.pt`.

    The loss is L1 + MSE with a tiny KL term. The decoder sees latents with noise of 2 % of their
    spread, so that it forgives the small errors that generated latents have.
    """
    model = build_autoencoder().to(device=device, memory_format=torch.channels_last)
    checkpoint = work_dir / "vae.pt"
    train_reconstruction(model, model, checkpoint, _targets, steps, batch_size, seed, 3e-3, 0.02)
    _fit_scaling(model, seed)
    return model.eval().requires_grad_(False)


def refine_decoder(
    model: AutoencoderKL, work_dir: Path, steps: int, batch_size: int = 8, seed: int = 1
) -> AutoencoderKL:
    """Trains the decoder alone for longer; the latents stay what the transformer learned.

    The latents have noise of 5 %, which makes the decoder yet more forgiving. It resumes from,
    and is kept as, `work_dir/decoder.pt`.
    """
    decoder = nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)
    checkpoint = work_dir / "decoder.pt"
    train_reconstruction(decoder, model, checkpoint, _targets, steps, batch_size, seed, 2e-3, 0.05)
    return model.eval().requires_grad_(False)


def decode_raw(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Pictures or clips in [-1, 1] of latents as they are."""
    return model.decode(latents).sample


def train_reconstruction(
    trained: nn.Module,
    model: ModelMixin,
    checkpoint: Path,
    draw: Draw,
    steps: int,
    batch_size: int,
    seed: int,
    peak: float,
    noise_share: float,
    decode: Callable[[ModelMixin, torch.Tensor], torch.Tensor] = decode_raw,
) -> None:
    """Trains the part `trained` of `model` on reconstruction, with resumable checkpoints.

    `model` is an autoencoder of pictures or of clips, and `draw` gives what it learns from. `peak`
    is the highest learning rate, `noise_share` the noise on the decoder's input as a share of the
    latents' spread; `decode` is what gradients go through.
    """
    optimizer = torch.optim.AdamW(trained.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0)
    device = next(model.parameters()).device
    start = 0
    if checkpoint.exists():
        state = load_state(checkpoint)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=checkpoint.stem)
    saved = time.monotonic()
    for step in progress:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = draw(batch_size, generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = peak * _schedule(step, steps)
        posterior = model.encode(target).latent_dist
        latents = posterior.mean
        noise = torch.randn(latents.shape, generator=generator).to(device)
        latents = latents + noise_share * latents.detach().std() * noise
        difference = decode(model, latents) - target
        loss = difference.abs().mean() + 2 * difference.square().mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            psnr = -10 * math.log10(difference.square().mean().item() / 4)
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}")
        if time.monotonic() - saved > 60 or step + 1 == steps:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomic({**state, "step": step + 1}, checkpoint)
            _save_reconstructions(model, draw, checkpoint.with_suffix(".png"))
            saved = time.monotonic()


@torch.no_grad()
def encode_pictures(
    model: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 50
) -> torch.Tensor:
    """Latents [N, C, 16, 16] of about unit variance, as the pipeline's transformer sees them."""
    device = next(model.parameters()).device
    means = []
    for part in pictures.split(batch_size):
        pixels = (2 * part.to(device) - 1).contiguous(memory_format=torch.channels_last)
        means.append(model.encode(pixels).latent_dist.mean)
    return (torch.cat(means) - model.config.shift_factor) * model.config.scaling_factor


def absorb_shift(model: AutoencoderKL) -> AutoencoderKL:
    """A copy of the autoencoder whose latents have zero mean without a `shift_factor`.

    The pipelines of PixArt and DiT know `scaling_factor` alone. The shift goes into the biases of
    the convolutions beside the latents, which changes neither pictures nor scaled latents.
    """
    model = deepcopy(model)
    shift, channels = model.config.shift_factor, model.config.latent_channels
    with torch.no_grad():
        model.quant_conv.bias[:channels] -= shift
        model.post_quant_conv.bias += shift * model.post_quant_conv.weight.sum((1, 2, 3))
    model.register_to_config(shift_factor=0.0)
    return model


@torch.no_grad()
def decode_latents(model: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1] of scaled latents, on the CPU."""
    latents = latents.to(next(model.parameters()).device)
    latents = latents / model.config.scaling_factor + model.config.shift_factor
    return (model.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()


def reconstruction_psnr(model: AutoencoderKL, number: int = 256, seed: int = 99) -> float:
    """Mean PSNR in dB over fresh pictures."""
    pictures, _ = training_pictures(number, torch.Generator().manual_seed(seed))
    error = torch.cat(
        [
            (decode_latents(model, encode_pictures(model, batch)) - batch).square().mean((1, 2, 3))
            for batch in pictures.split(32)
        ]
    )
    return float((-10 * error.log10()).mean())


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def _fit_scaling(model: AutoencoderKL, seed: int) -> None:
    """Sets shift and scale so that the latents have zero mean and unit variance."""
    pictures, _ = training_pictures(256, torch.Generator().manual_seed(seed + 7))
    device = next(model.parameters()).device
    means = [
        model.encode(2 * batch.to(device) - 1).latent_dist.mean for batch in pictures.split(32)
    ]
    latents = torch.cat(means)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    model.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))


@torch.no_grad()
def _save_reconstructions(model: ModelMixin, draw: Draw, path: Path) -> None:
    target = draw(8, torch.Generator().manual_seed(5)).to(next(model.parameters()).device)
    decoded = decode_raw(model, model.encode(target).latent_dist.mean)
    shown = torch.cat([target, decoded]).cpu() / 2 + 0.5
    if shown.ndim == 4:
        save_grid(shown, path)
    else:
        rows = clip_rows(shown.transpose(1, 2))
        save_grid(rows, path, columns=len(rows) // len(shown))
