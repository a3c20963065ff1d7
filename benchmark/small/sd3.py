"""The small Stable Diffusion 3 pipeline: an MMDiT, flow matching and guidance."""

from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from benchmark.small.autoencoder import encode_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.flux import FluxBatch, FluxExamples
from benchmark.small.initialisation import zero_
from benchmark.small.judge import Judge
from benchmark.small.latents import load_encoded
from benchmark.small.pixart import draw_pictures
from benchmark.small.scenes import labels_scene, sample_labels
from benchmark.small.splits import held_back_labels
from benchmark.small.text import (
    TEXT_WIDTH,
    build_t5_encoder,
    clip_options,
    tokenise_clip,
    tokenise_t5,
    warm_up_text_encoders,
)
from benchmark.small.tokenizers import build_clip_tokenizer, build_t5_tokenizer

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
JOINT_WIDTH = 2 * TEXT_WIDTH
"""Of both CLIP encoders' states side by side, and of T5's."""


def build_transformer(latent_channels: int = 8) -> SD3Transformer2DModel:
    """An untrained MMDiT with 10 blocks of width 96, 3.5 M parameters.

    The modulations and the output start at zero, so that every block starts as the identity.
    """
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=10,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=JOINT_WIDTH,
        pos_embed_max_size=8,
    )
    norms = [transformer.norm_out]
    for block in transformer.transformer_blocks:
        norms += [block.norm1, block.norm1_context]
    zero_([*(norm.linear for norm in norms), transformer.proj_out])
    return transformer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained one of `clip_options`."""
    return CLIPTextModelWithProjection(CLIPTextConfig(**clip_options(tokenizer)))


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A pipeline around `vae` with untrained text encoders and transformer."""
    tokenizers = build_clip_tokenizer(), build_clip_tokenizer(), build_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(vae.config.latent_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=build_text_encoder(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=build_text_encoder(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=build_t5_encoder(tokenizers[2], JOINT_WIDTH),
        tokenizer_3=tokenizers[2],
    )


def encode(
    encoders: nn.ModuleDict, clip_ids: torch.Tensor, t5_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, 48, 128] and pooled states [B, 128] of token ids [B, 24], as in the pipeline."""
    clips = [encoders[name](clip_ids, output_hidden_states=True) for name in ENCODERS[:2]]
    states = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
    states = torch.cat([states, encoders[ENCODERS[2]](t5_ids)[0]], dim=1)
    return states, torch.cat([output[0] for output in clips], dim=-1)


def tokenise(
    pipeline: StableDiffusion3Pipeline, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and T5 token ids, each [N, 24], padded as the pipeline pads them."""
    return tokenise_clip(pipeline.tokenizer, prompts), tokenise_t5(pipeline.tokenizer_3, prompts)


def tokenise_labels(
    pipeline: StableDiffusion3Pipeline, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokenise` of the prompts of label rows [N, 7]."""
    return tokenise(pipeline, [labels_scene(row).prompt for row in labels])


def load_examples(
    pipeline: StableDiffusion3Pipeline, number: int, seed: int, path: Path
) -> FluxExamples:
    """Pictures of one object."""
    latents, labels = load_encoded(
        path,
        number,
        seed,
        partial(draw_pictures, family="sd3"),
        lambda pictures: encode_pictures(pipeline.vae, pictures),
    )
    return FluxExamples(
        latents=latents, ids=tokenise_labels(pipeline, labels), empty_ids=tokenise(pipeline, [""])
    )


def loss(model: nn.ModuleDict, batch: FluxBatch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the pipeline's own arguments."""
    states, pooled = encode(model, batch.clip_ids, batch.t5_ids)
    velocity = model["transformer"](
        hidden_states=batch.noisy,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=1000 * batch.sigma,
        return_dict=False,
    )[0]
    return (velocity - batch.velocity).square().mean()


def warm_up(pipeline: StableDiffusion3Pipeline) -> float:
    """Teaches the text encoders to name the scene, `warm_up_text_encoders`."""
    generator, held_back = torch.Generator().manual_seed(1), held_back_labels("sd3")
    labels = sample_labels(8192, generator, exclude=held_back, single_share=1.0)
    encoders = [getattr(pipeline, name) for name in ENCODERS]
    return warm_up_text_encoders(
        nn.ModuleList(encoders),
        lambda clip_ids, t5_ids: [
            encoder(ids)[0]
            for encoder, ids in zip(encoders, (clip_ids, clip_ids, t5_ids), strict=True)
        ],
        tokenise_labels(pipeline, labels),
        labels,
    )


FAMILY = SmallFamily(
    name="sd3",
    trained=("transformer", *ENCODERS),
    config=TrainingConfig(minutes=60.0, examples=12_000),
    latents="sd3_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=Judge.prompt_accuracy,
    warm_up=warm_up,
)
