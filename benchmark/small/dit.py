"""The small DiT pipeline: components, examples, loss, and how it is called."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from benchmark.small.autoencoder import absorb_shift, encode_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.initialisation import copy_input_, zero_
from benchmark.small.judge import Judge, label_accuracy
from benchmark.small.latents import load_encoded
from benchmark.small.noise import BETAS, NoiseBatch, NoiseExamples, noise_loss
from benchmark.small.pictures import render
from benchmark.small.scenes import COLOURS, LABELS, PATTERNS, SHAPES, sample_labels
from benchmark.small.splits import CLASSES

NULL_CLASS = 1000
"""What `DiTPipeline` takes for guidance, whatever the number of classes."""


def build_transformer(latent_channels: int = 8) -> DiTTransformer2DModel:
    """An untrained DiT with 14 blocks of width 96, 4.1 M parameters.

    A third of the parameters are the blocks' tables of 1000 classes, of which `CLASSES` are used.
    As in the published models twice the latents' channels come out. The second half, the variance,
    starts at zero and is not trained. The blocks start as the identity, and the first half as the
    latents themselves.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=latent_channels,
        out_channels=2 * latent_channels,
        num_layers=14,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    zero_([transformer.proj_out_1])
    zero_(block.norm1.linear for block in transformer.transformer_blocks)
    for block in transformer.transformer_blocks:
        classes = block.norm1.emb.class_embedder
        nn.init.normal_(classes.embedding_table.weight, std=0.02)
        # examples drop classes themselves, so that all blocks drop the same ones
        classes.dropout_prob = 0.0
    embedding = transformer.pos_embed
    copy_input_(embedding.proj, transformer.proj_out_2, embedding.pos_embed[0])
    return transformer


def build_pipeline(vae: AutoencoderKL) -> DiTPipeline:
    """A pipeline around a copy of `vae` with an untrained transformer."""
    id2label = dict(enumerate(CLASSES))
    pipeline = DiTPipeline(
        transformer=build_transformer(vae.config.latent_channels),
        vae=absorb_shift(vae),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False),
        id2label=id2label,
    )
    # the class itself does not keep the names in what it saves
    pipeline.register_to_config(id2label=id2label)
    return pipeline


def class_ids(labels: torch.Tensor) -> torch.Tensor:
    """Indices into `CLASSES`, int64 [N], of label rows [N, 7] of single objects."""
    shape, colour = (labels[:, LABELS.index(name)] for name in ("shape_1", "colour_1"))
    return shape * len(COLOURS) + colour


def class_labels(names: Sequence[str]) -> torch.Tensor:
    """Label rows [N, 7] of class names; -1 in the columns of which a name does not speak."""
    rows = torch.full((len(names), len(LABELS)), -1)
    for row, name in zip(rows, names, strict=True):
        colour, shape = name.split()
        row[:3] = torch.tensor([0, SHAPES.index(shape), COLOURS.index(colour)])
    return rows


def draw_pictures(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [number, 3, 64, 64] of one object before a plain background, and label rows."""
    labels = sample_labels(number, generator, single_share=1.0)
    labels[:, LABELS.index("pattern")] = PATTERNS.index("plain")
    return render(labels, generator), labels


def load_examples(pipeline: DiTPipeline, number: int, seed: int, path: Path) -> NoiseExamples:
    """Pictures of one object before a plain background."""
    latents, labels = load_encoded(
        path, number, seed, draw_pictures, lambda p: encode_pictures(pipeline.vae, p)
    )
    return NoiseExamples(
        latents=latents, conditions=class_ids(labels), empty=torch.tensor(NULL_CLASS)
    )


def loss(model: nn.ModuleDict, batch: NoiseBatch) -> torch.Tensor:
    """`noise_loss` with the pipeline's own arguments."""
    prediction = model["transformer"](
        batch.noisy, timestep=batch.timesteps, class_labels=batch.conditions, return_dict=False
    )[0]
    return noise_loss(prediction, batch)


def accuracy(judge: Judge, pictures: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """`label_accuracy` of the number of objects, the shape and the colour."""
    return label_accuracy(judge.predict(pictures).cpu(), class_labels(names))


FAMILY = SmallFamily(
    name="dit",
    trained=("transformer",),
    config=TrainingConfig(minutes=25.0, examples=10_000, learning_rate=1e-3),
    latents="dit_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=accuracy,
)
