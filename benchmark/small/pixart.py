"""The small PixArt-Sigma pipeline: components, examples, loss, and how it is called."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn

from benchmark.small.autoencoder import absorb_shift, encode_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.initialisation import copy_input_, zero_
from benchmark.small.judge import Judge
from benchmark.small.latents import load_encoded
from benchmark.small.noise import BETAS, NoiseBatch, NoiseExamples, noise_loss
from benchmark.small.pictures import render
from benchmark.small.scenes import labels_scene, sample_labels
from benchmark.small.splits import held_back_labels
from benchmark.small.text import (
    TEXT_WIDTH,
    build_t5_encoder,
    encode_masked,
    tokenise_t5,
    warm_up_text_encoders,
)
from benchmark.small.tokenizers import build_t5_tokenizer

TEXT_TOKENS = 16


def build_transformer(latent_channels: int = 8) -> PixArtTransformer2DModel:
    """An untrained PixArt transformer with 14 blocks of width 96, 2.2 M parameters.

    As in the published models twice the latents' channels come out. The second half, the variance,
    starts at zero and is not trained. The blocks start as the identity, and the first half as the
    latents themselves.
    """
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        cross_attention_dim=96,
        num_layers=14,
        in_channels=latent_channels,
        out_channels=2 * latent_channels,
        sample_size=16,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    zero_([transformer.adaln_single.linear])
    zero_(block.attn2.to_out[0] for block in transformer.transformer_blocks)
    tables = [block.scale_shift_table for block in transformer.transformer_blocks]
    for table in (*tables, transformer.scale_shift_table):
        nn.init.zeros_(table)
    # the time embedding itself modulates the output: it starts small
    nn.init.normal_(transformer.adaln_single.emb.timestep_embedder.linear_2.weight, std=0.005)
    nn.init.zeros_(transformer.adaln_single.emb.timestep_embedder.linear_2.bias)
    embedding = transformer.pos_embed
    copy_input_(embedding.proj, transformer.proj_out, embedding.pos_embed[0])
    return transformer


def build_pipeline(vae: AutoencoderKL) -> PixArtSigmaPipeline:
    """A pipeline around a copy of `vae` with untrained text encoder and transformer."""
    tokenizer = build_t5_tokenizer(model_max_length=TEXT_TOKENS)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_t5_encoder(tokenizer),
        vae=absorb_shift(vae),
        transformer=build_transformer(vae.config.latent_channels),
        scheduler=DPMSolverMultistepScheduler(
            **BETAS, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace"
        ),
    )


def draw_pictures(
    number: int, generator: torch.Generator, family: str = "pixart"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [number, 3, 64, 64] of one object and their labels, none of the test split."""
    held_back = held_back_labels(family)
    labels = sample_labels(number, generator, exclude=held_back, single_share=1.0)
    return render(labels, generator), labels


def load_examples(
    pipeline: PixArtSigmaPipeline, number: int, seed: int, path: Path
) -> NoiseExamples:
    """Pictures of one object."""
    latents, labels = load_encoded(
        path, number, seed, draw_pictures, lambda p: encode_pictures(pipeline.vae, p)
    )
    return NoiseExamples(
        latents=latents,
        conditions=tokenise_labels(pipeline, labels),
        empty=tokenise_t5(pipeline.tokenizer, [""])[0],
    )


def tokenise_labels(pipeline: PixArtSigmaPipeline, labels: torch.Tensor) -> torch.Tensor:
    """T5 token ids [N, 16] of the prompts of label rows [N, 7]."""
    return tokenise_t5(pipeline.tokenizer, [labels_scene(row).prompt for row in labels])


def loss(model: nn.ModuleDict, batch: NoiseBatch) -> torch.Tensor:
    """`noise_loss` with the pipeline's own arguments."""
    states, mask = encode_masked(model["text_encoder"], batch.conditions)
    prediction = model["transformer"](
        batch.noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=batch.timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return noise_loss(prediction, batch)


def warm_up(pipeline: PixArtSigmaPipeline) -> float:
    """Teaches the text encoder to name the scene, `warm_up_text_encoders`."""
    labels = sample_labels(
        8192, torch.Generator().manual_seed(1), exclude=held_back_labels("pixart"), single_share=1.0
    )
    return warm_up_text_encoders(
        nn.ModuleList([pipeline.text_encoder]),
        lambda ids: [encode_masked(pipeline.text_encoder, ids)[0]],
        [tokenise_labels(pipeline, labels)],
        labels,
    )


FAMILY = SmallFamily(
    name="pixart",
    trained=("transformer", "text_encoder"),
    config=TrainingConfig(minutes=28.0, examples=12_000, learning_rate=1e-3),
    latents="pixart_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=Judge.prompt_accuracy,
    warm_up=warm_up,
)
