"""The small Open-Sora pipeline: components, examples, loss, and how it is called."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from benchmark.models.package import VIDEO_FPS
from benchmark.small.autoencoder import encode_pictures
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.clip_texts import CLIP_WORDS, TEXT_TOKENS, tokenise_labels, warm_up_on_clips
from benchmark.small.clips import FRAMES, render_clips
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.initialisation import isometric_, zero_
from benchmark.small.latents import load_encoded, sample_sigmas
from benchmark.small.motion import reversed_motion, sample_labels
from benchmark.small.splits import held_back_motions
from benchmark.small.text import (
    TEXT_WIDTH,
    build_t5_encoder,
    encode_masked,
)
from benchmark.small.tokenizers import build_t5_tokenizer
from xfuser_adacorr.models import OpenSoraPipeline, RectifiedFlowScheduler, STDiT3Transformer3DModel

SIZE = 64
DWELL_ABOVE = 0.7
"""Sixteen frames tell more of a shape than one: it is decided at higher noise than in a picture."""
PICTURE_SHARE = 0.5
"""Share of the batches that are single frames: as many tokens show sixteen times the scenes."""


def build_transformer(latent_channels: int = 8) -> STDiT3Transformer3DModel:
    """An untrained STDiT3 with 6 pairs of blocks of width 80, 1.3 M parameters.

    As in the published model twice the latents' channels come out. The second half starts at zero
    and is not trained. The blocks start as the identity, and the output at zero.
    """
    transformer = STDiT3Transformer3DModel(
        in_channels=latent_channels,
        hidden_size=80,
        depth=6,
        num_heads=4,
        patch_size=(1, 2, 2),
        input_sq_size=SIZE,
        caption_channels=TEXT_WIDTH,
        model_max_length=TEXT_TOKENS,
    )
    blocks = [*transformer.spatial_blocks, *transformer.temporal_blocks]
    zero_([transformer.t_block[1], transformer.final_layer.linear])
    zero_(block.cross_attn.proj for block in blocks)
    for table in (block.scale_shift_table for block in (*blocks, transformer.final_layer)):
        nn.init.zeros_(table)
    positions = transformer.embed_positions((8, 8), SIZE, SIZE, torch.device("cpu"))
    isometric_(transformer.x_embedder.proj, positions)
    return transformer


def build_pipeline(vae: AutoencoderKL) -> OpenSoraPipeline:
    """A pipeline around `vae` with untrained text encoder and transformer."""
    tokenizer = build_t5_tokenizer(CLIP_WORDS, TEXT_TOKENS)
    return OpenSoraPipeline(
        tokenizer=tokenizer,
        text_encoder=build_t5_encoder(tokenizer),
        transformer=build_transformer(vae.config.latent_channels),
        # the timestep transform is made for other sizes: for this one it would skip high noise
        scheduler=RectifiedFlowScheduler(use_timestep_transform=False),
        vae=vae,
        prompt_suffix="",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """One step's tensors."""

    noisy: torch.Tensor
    """x_sigma = (1 - sigma) x_0 + sigma noise, [B, C, T, 16, 16] (channels, frames, H, W)."""

    velocity: torch.Tensor
    """The target, x_0 - noise, [B, C, T, 16, 16]."""

    timesteps: torch.Tensor
    """1000 sigma, float32 [B]."""

    ids: torch.Tensor
    """T5 token ids, [B, 16]."""

    dropped: torch.Tensor
    """Where the text is replaced by the null text, bool [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipExamples:
    """Encoded clips with the token ids of their prompts."""

    latents: torch.Tensor
    """float16 [N, C, 16, 16, 16]."""

    ids: torch.Tensor
    """T5 token ids of the clips, and of the same clips played backwards, [2, N, 16]."""

    def batch(
        self, size: int, empty_share: float, generator: torch.Generator, device: str
    ) -> ClipBatch:
        """Draws clips, half of them backwards, or 16 times as many frames, and noise.

        `empty_share` of the texts become the null text.
        """
        pictures = torch.rand((), generator=generator) < PICTURE_SHARE
        if pictures:
            size *= FRAMES
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        backwards = torch.randint(2, (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < empty_share
        clean = self.latents[chosen].float()
        if pictures:
            frames = torch.randint(FRAMES, (size,), generator=generator)
            clean = clean[torch.arange(size), :, frames].unsqueeze(2)
            sigma = sample_sigmas(size, generator)
        else:
            clean = torch.where(backwards.view(-1, 1, 1, 1, 1) == 1, clean.flip(2), clean)
            sigma = sample_sigmas(size, generator, DWELL_ABOVE)
        noise = torch.randn(clean.shape, generator=generator)
        return ClipBatch(
            noisy=torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1)).to(device),
            velocity=(clean - noise).to(device),
            timesteps=(1000 * sigma).to(device),
            ids=self.ids[backwards, chosen].to(device),
            dropped=dropped.to(device),
        )


def draw_clips(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [number, 16, 3, 64, 64] outside the test split, forwards and backwards, and labels."""
    labels = sample_labels(number, generator, exclude=held_back_motions())
    return render_clips(labels, generator), labels


def encode_clips(vae: AutoencoderKL, clips: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, 16, 16, 16] (channels, frames, H, W) of clips [N, 16, 3, 64, 64]."""
    latents = encode_pictures(vae, clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
    return latents.transpose(1, 2)


def load_examples(pipeline: OpenSoraPipeline, number: int, seed: int, path: Path) -> ClipExamples:
    """Clips of one moving shape."""
    latents, labels = load_encoded(
        path, number, seed, draw_clips, lambda clips: encode_clips(pipeline.vae, clips), chunk=40
    )
    both = [tokenise_labels(pipeline, rows) for rows in (labels, reversed_motion(labels))]
    return ClipExamples(latents=latents, ids=torch.stack(both))


def loss(model: nn.ModuleDict, batch: ClipBatch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the pipeline's own arguments."""
    transformer = model["transformer"]
    states, mask = encode_masked(model["text_encoder"], batch.ids)
    null_text = transformer.y_embedder.y_embedding
    prediction = transformer(
        hidden_states=batch.noisy,
        timestep=batch.timesteps,
        encoder_hidden_states=torch.where(batch.dropped.view(-1, 1, 1), null_text, states),
        encoder_attention_mask=mask,
        fps=VIDEO_FPS,
        height=SIZE,
        width=SIZE,
        return_dict=False,
    )[0]
    return (prediction[:, : batch.noisy.shape[1]] - batch.velocity).square().mean()


FAMILY = SmallFamily(
    name="opensora",
    trained=("transformer", "text_encoder"),
    config=TrainingConfig(minutes=35.0, batch_size=6, examples=2_500),
    latents="opensora_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=ClipJudge.prompt_accuracy,
    warm_up=partial(warm_up_on_clips, family="opensora"),
    clips=True,
)
