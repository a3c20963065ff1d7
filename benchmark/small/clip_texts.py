"""Prompts of clips as a small pipeline's T5 encoder sees them."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from benchmark.small.motion import CHOICES, labels_moving, sample_labels
from benchmark.small.motion import WORDS as MOTION_WORDS
from benchmark.small.splits import held_back_motions
from benchmark.small.text import encode_masked, tokenise_t5, warm_up_text_encoders
from benchmark.small.tokenizers import WORDS

TEXT_TOKENS = 16
CLIP_WORDS = (*WORDS, *MOTION_WORDS)


def tokenise_labels(pipeline: DiffusionPipeline, labels: torch.Tensor) -> torch.Tensor:
    """Token ids [N, 16] of the prompts of label rows [N, 6]."""
    return tokenise_t5(pipeline.tokenizer, [labels_moving(row).prompt for row in labels])


def warm_up_on_clips(pipeline: DiffusionPipeline, family: str) -> float:
    """Teaches the text encoder to name scenes outside the family's test split.

    `warm_up_text_encoders` does it.
    """
    generator = torch.Generator().manual_seed(1)
    labels = sample_labels(8192, generator, exclude=held_back_motions(family))
    return warm_up_text_encoders(
        nn.ModuleList([pipeline.text_encoder]),
        lambda ids: [encode_masked(pipeline.text_encoder, ids)[0]],
        [tokenise_labels(pipeline, labels)],
        labels,
        CHOICES,
    )
