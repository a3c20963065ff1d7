"""Gives the text encoders a first grasp of the prompts before the transformer's training."""

import logging

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.flux import POOLED_WIDTH, TEXT_WIDTH, tokenise_labels
from benchmark.small.scenes import CHOICES, sample_labels
from benchmark.small.splits import held_back_labels

logger = logging.getLogger(__name__)


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the concatenated heads [..., sum(CHOICES)], absent objects left out."""
    losses = [
        F.cross_entropy(head.flatten(0, -2), column.flatten(), ignore_index=-1)
        for head, column in zip(logits.split(CHOICES, dim=-1), labels.unbind(-1), strict=True)
    ]
    return torch.stack(losses).sum()


def warm_up_text_encoders(
    pipeline: FluxPipeline, steps: int = 400, batch_size: int = 128, seed: int = 1
) -> float:
    """Trains both text encoders so that linear heads read the scene from their outputs.

    The heads read the pooled vector and every token of the sequence, and are thrown away. The
    encoders go on learning with the transformer, which profits from a readable start.

    Returns:
        The last step's loss.
    """
    device = pipeline.transformer.device
    generator = torch.Generator().manual_seed(seed)
    heads = nn.ModuleList(
        [nn.Linear(POOLED_WIDTH, sum(CHOICES)), nn.Linear(TEXT_WIDTH, sum(CHOICES))]
    )
    modules = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, heads.to(device)])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    held_back = held_back_labels()
    labels = sample_labels(8192, generator, exclude=held_back)
    clip_ids, t5_ids = tokenise_labels(pipeline, labels)
    for _ in tqdm(range(steps), desc="text encoders"):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        target = labels[chosen].to(device)
        pooled = pipeline.text_encoder(clip_ids[chosen].to(device)).pooler_output
        sequence = pipeline.text_encoder_2(t5_ids[chosen].to(device))[0]
        every_token = target.unsqueeze(1).expand(-1, sequence.shape[1], -1)
        loss = label_loss(heads[0](pooled), target) + label_loss(heads[1](sequence), every_token)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    logger.info("text encoders: loss %.4f after %d steps", loss.item(), steps)
    return loss.item()
