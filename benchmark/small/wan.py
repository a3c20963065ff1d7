"""The small Wan 2.1 pipeline: components, examples, loss, and how it is called."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import UMT5EncoderModel

from benchmark.models.families import FAMILIES
from benchmark.small.clip_autoencoder import encode_clips
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.clip_texts import CLIP_WORDS, TEXT_TOKENS, tokenise_labels, warm_up_on_clips
from benchmark.small.clips import render_clips
from benchmark.small.family import CLIPS, SmallFamily, TrainingConfig
from benchmark.small.initialisation import isometric_, zero_
from benchmark.small.latents import load_encoded, sample_sigmas
from benchmark.small.motion import sample_labels
from benchmark.small.splits import held_back_motions
from benchmark.small.text import (
    TEXT_WIDTH,
    build_umt5_encoder,
    encode_masked,
    tokenise_t5,
)
from benchmark.small.tokenizers import build_t5_tokenizer

FRAMES = FAMILIES["wan"].num_frames
WIDTH = 128
PICTURE_SHARE = 0.5
"""Share of the batches that are first frames alone: as many tokens show five times the scenes."""


def build_transformer(latent_channels: int = 16) -> WanTransformer3DModel:
    """An untrained Wan transformer with 8 blocks of width 128, 2.0 M parameters.

    The modulations, the cross-attention's and the model's output start at zero, so that every block
    starts as the identity.
    """
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=3 * WIDTH,
        num_layers=8,
        rope_max_seq_len=64,
    )
    blocks = transformer.blocks
    zero_([transformer.condition_embedder.time_proj, transformer.proj_out])
    zero_(block.attn2.to_out[0] for block in blocks)
    for part in (*blocks, transformer):
        nn.init.zeros_(part.scale_shift_table)
    isometric_(transformer.patch_embedding, torch.zeros(1, WIDTH))
    return transformer


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """A pipeline around `vae` with untrained text encoder and transformer."""
    tokenizer = build_t5_tokenizer(CLIP_WORDS, TEXT_TOKENS)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_umt5_encoder(tokenizer),
        transformer=build_transformer(vae.config.z_dim),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WanBatch:
    """One step's tensors."""

    noisy: torch.Tensor
    """x_sigma = (1 - sigma) x_0 + sigma noise, [B, 16, T, 8, 8] (channels, latents, H, W)."""

    velocity: torch.Tensor
    """The target, noise - x_0, [B, 16, T, 8, 8]."""

    timesteps: torch.Tensor
    """1000 sigma, float32 [B]."""

    ids: torch.Tensor
    """Token ids, [B, 16]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WanExamples:
    """Encoded clips with the token ids of their prompts."""

    latents: torch.Tensor
    """float16 [N, 16, T, 8, 8]; the first of T is of the first frame alone."""

    ids: torch.Tensor
    """Token ids, [N, 16]."""

    empty_ids: torch.Tensor
    """Token ids of the empty prompt, [1, 16]."""

    def batch(
        self, size: int, empty_share: float, generator: torch.Generator, device: str
    ) -> WanBatch:
        """Draws clips, or T times as many first frames, and noise.

        `empty_share` of the texts become the empty one.
        """
        count = self.latents.shape[2]
        if torch.rand((), generator=generator) < PICTURE_SHARE:
            size, count = size * count, 1
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < empty_share
        clean = self.latents[chosen, :, :count].float()
        sigma = sample_sigmas(size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        return WanBatch(
            noisy=torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1)).to(device),
            velocity=(noise - clean).to(device),
            timesteps=(1000 * sigma).to(device),
            ids=torch.where(dropped.view(-1, 1), self.empty_ids, self.ids[chosen]).to(device),
        )


def draw_clips(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [number, 17, 3, 64, 64] outside the test split, and their label rows."""
    labels = sample_labels(number, generator, exclude=held_back_motions("wan"))
    return render_clips(labels, generator, FRAMES), labels


def load_examples(pipeline: WanPipeline, number: int, seed: int, path: Path) -> WanExamples:
    """Clips of one moving shape."""
    latents, labels = load_encoded(
        path, number, seed, draw_clips, lambda clips: encode_clips(pipeline.vae, clips), chunk=40
    )
    return WanExamples(
        latents=latents,
        ids=tokenise_labels(pipeline, labels),
        empty_ids=tokenise_t5(pipeline.tokenizer, [""]),
    )


def encode(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """States [N, 16, 64] of token ids [N, 16], zero where padding is, as in the pipeline."""
    states, mask = encode_masked(text_encoder, ids)
    return states * mask.unsqueeze(-1)


def loss(model: nn.ModuleDict, batch: WanBatch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the pipeline's own arguments."""
    velocity = model["transformer"](
        hidden_states=batch.noisy,
        timestep=batch.timesteps,
        encoder_hidden_states=encode(model["text_encoder"], batch.ids),
        return_dict=False,
    )[0]
    return (velocity - batch.velocity).square().mean()


FAMILY = SmallFamily(
    name="wan",
    trained=("transformer", "text_encoder"),
    config=TrainingConfig(minutes=60.0, batch_size=6, examples=2_500),
    latents="wan_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=ClipJudge.prompt_accuracy,
    autoencoding=CLIPS,
    warm_up=partial(warm_up_on_clips, family="wan"),
    clips=True,
)
