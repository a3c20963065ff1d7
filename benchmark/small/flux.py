"""The small FLUX pipeline: its components, its examples and loss, and how it is called."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

from benchmark.small.autoencoder import encode_pictures, training_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.initialisation import zero_
from benchmark.small.judge import Judge
from benchmark.small.latents import load_encoded, sample_sigmas
from benchmark.small.scenes import labels_scene, sample_labels
from benchmark.small.splits import held_back_labels
from benchmark.small.text import (
    TEXT_WIDTH,
    build_clip_encoder,
    build_t5_encoder,
    tokenise_clip,
    tokenise_t5,
    warm_up_text_encoders,
)
from benchmark.small.tokenizers import build_clip_tokenizer, build_t5_tokenizer


def build_transformer(latent_channels: int = 8) -> FluxTransformer2DModel:
    """An untrained FLUX transformer with 4 dual and 10 single blocks, 4.8 M parameters.

    The modulations and the output start at zero, so that every block starts as the identity.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=4,
        num_single_layers=10,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = [transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    zero_([*modulations, transformer.proj_out])
    return transformer


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """A pipeline around `vae` with untrained text encoders and transformer."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=build_clip_encoder(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_t5_encoder(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(vae.config.latent_channels),
    )


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, H, W] as the transformer's tokens [N, H W / 4, 4 C]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def image_ids(height: int, width: int) -> torch.Tensor:
    """Position ids [height width / 4, 3] of the packed tokens of latents [.., height, width]."""
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


def tokenise(pipeline: FluxPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and T5 token ids, each [N, 24], padded as the pipeline pads them."""
    return tokenise_clip(pipeline.tokenizer, prompts), tokenise_t5(pipeline.tokenizer_2, prompts)


def tokenise_labels(
    pipeline: FluxPipeline, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokenise` of the prompts of label rows [N, 7]."""
    return tokenise(pipeline, [labels_scene(row).prompt for row in labels])


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxBatch:
    """One step's tensors."""

    noisy: torch.Tensor
    """x_sigma = (1 - sigma) x_0 + sigma noise, [B, 64, 4 C]; of SD3 not packed, [B, C, 16, 16]."""

    velocity: torch.Tensor
    """The target, noise - x_0, of the same shape."""

    sigma: torch.Tensor
    """Noise levels in (0, 1), [B]."""

    positions: torch.Tensor
    """Position ids [64, 3]."""

    clip_ids: torch.Tensor
    """CLIP token ids, [B, 24]."""

    t5_ids: torch.Tensor
    """T5 token ids, [B, 24]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxExamples:
    """Encoded pictures with the token ids of their prompts."""

    latents: torch.Tensor
    """Packed latents, float16 [N, 64, 4 C]; of SD3 as they are, [N, C, 16, 16]."""

    ids: tuple[torch.Tensor, torch.Tensor]
    """CLIP and T5 token ids, each [N, 24]."""

    empty_ids: tuple[torch.Tensor, torch.Tensor]
    """Both kinds of token ids of the empty prompt, each [1, 24]."""

    def batch(
        self, size: int, empty_share: float, generator: torch.Generator, device: str
    ) -> FluxBatch:
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
        return FluxBatch(
            noisy=torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1))).to(device),
            velocity=(noise - clean).to(device),
            sigma=sigma.to(device),
            positions=image_ids(16, 16).to(device),
            clip_ids=clip_ids,
            t5_ids=t5_ids,
        )


def load_examples(pipeline: FluxPipeline, number: int, seed: int, path: Path) -> FluxExamples:
    """Pictures of one or two objects."""
    latents, labels = load_encoded(
        path,
        number,
        seed,
        draw=training_pictures,
        encode=lambda pictures: pack_latents(encode_pictures(pipeline.vae, pictures)),
    )
    return FluxExamples(
        latents=latents, ids=tokenise_labels(pipeline, labels), empty_ids=tokenise(pipeline, [""])
    )


def flow_loss(model: nn.ModuleDict, batch: FluxBatch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the pipeline's own arguments."""
    sequence = model["text_encoder_2"](batch.t5_ids)[0]
    velocity = model["transformer"](
        hidden_states=batch.noisy,
        encoder_hidden_states=sequence,
        pooled_projections=model["text_encoder"](batch.clip_ids).pooler_output,
        timestep=batch.sigma,
        img_ids=batch.positions,
        txt_ids=sequence.new_zeros(sequence.shape[1], 3),
        return_dict=False,
    )[0]
    return (velocity - batch.velocity).square().mean()


def warm_up(pipeline: FluxPipeline) -> float:
    """Teaches both text encoders to name the scene, `warm_up_text_encoders`."""
    labels = sample_labels(8192, torch.Generator().manual_seed(1), exclude=held_back_labels())
    return warm_up_text_encoders(
        nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2]),
        lambda clip_ids, t5_ids: (
            pipeline.text_encoder(clip_ids).pooler_output,
            pipeline.text_encoder_2(t5_ids)[0],
        ),
        tokenise_labels(pipeline, labels),
        labels,
    )


FAMILY = SmallFamily(
    name="flux",
    trained=("transformer", "text_encoder", "text_encoder_2"),
    config=TrainingConfig(minutes=132.0),
    latents="latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=flow_loss,
    accuracy=Judge.prompt_accuracy,
    warm_up=warm_up,
)
