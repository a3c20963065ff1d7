"""The small text encoders, and their first grasp of the prompts before the whole training."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmark.small.scenes import CHOICES

logger = logging.getLogger(__name__)

TEXT_WIDTH = 64


def build_t5_encoder(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    """An untrained one of `t5_options`."""
    return T5EncoderModel(T5Config(**t5_options(tokenizer, width)))


def build_umt5_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """An untrained one of `t5_options`, where every layer has its own relative positions."""
    return UMT5EncoderModel(UMT5Config(**t5_options(tokenizer)))


def t5_options(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> dict[str, Any]:
    """Options of a T5 encoder of 2 layers for the tokenizer's vocabulary."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 16,
        "d_ff": 4 * width,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def clip_options(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Options of a CLIP text encoder of 2 layers and width 64 for the tokenizer's vocabulary."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained one of `clip_options`."""
    return CLIPTextModel(CLIPTextConfig(**clip_options(tokenizer)))


def tokenise_clip(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """CLIP token ids [N, `model_max_length`], padded as the pipelines pad them."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length}
    return tokenizer(list(prompts), truncation=True, return_tensors="pt", **options).input_ids


def tokenise_t5(tokenizer: T5Tokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """T5 token ids [N, `model_max_length`], padded as the pipelines pad them."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length}
    tokens = tokenizer(list(prompts), truncation=True, return_tensors="pt", **options)
    return tokens.input_ids


def encode_masked(
    text_encoder: T5EncoderModel | UMT5EncoderModel, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N, L, 64] of token ids [N, L], and the mask [N, L] that leaves the padding out."""
    mask = (ids != text_encoder.config.pad_token_id).long()
    return text_encoder(ids, attention_mask=mask)[0], mask


def label_loss(
    logits: torch.Tensor, labels: torch.Tensor, choices: Sequence[int] = CHOICES
) -> torch.Tensor:
    """Cross-entropy of the concatenated heads [..., sum(choices)], labels of -1 left out."""
    losses = []
    for head, column in zip(logits.split(choices, dim=-1), labels.unbind(-1), strict=True):
        total = F.cross_entropy(
            head.flatten(0, -2), column.flatten(), ignore_index=-1, reduction="sum"
        )
        losses.append(total / (column >= 0).sum().clamp(min=1))
    return torch.stack(losses).sum()


def warm_up_text_encoders(
    encoders: nn.ModuleList,
    encode: Callable[..., Sequence[torch.Tensor]],
    ids: Sequence[torch.Tensor],
    labels: torch.Tensor,
    choices: Sequence[int] = CHOICES,
    steps: int = 400,
    batch_size: int = 128,
    seed: int = 1,
) -> float:
    """Trains text encoders so that linear heads read the labels from their outputs.

    The heads are thrown away. The encoders go on learning with the transformer, which profits
    from a readable start.

    Args:
        encoders: what is trained.
        encode: token ids of a batch, one tensor for each of `ids` -> outputs [B, .., width].
        ids: token ids of the prompts, each [N, L].
        labels: label rows [N, columns].
        choices: how many values each column has.
        steps, batch_size, seed: of this training.

    Returns:
        The last step's loss.
    """
    device = next(encoders.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        widths = [output.shape[-1] for output in encode(*(part[:1].to(device) for part in ids))]
    heads = nn.ModuleList([nn.Linear(width, sum(choices)) for width in widths]).to(device)
    modules = nn.ModuleList([encoders, heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="text encoders"):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        target = labels[chosen].to(device)
        outputs = encode(*(part[chosen].to(device) for part in ids))
        loss = sum(
            label_loss(head(output), _for_every_token(target, output), choices)
            for head, output in zip(heads, outputs, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    logger.info("text encoders: loss %.4f after %d steps", loss.item(), steps)
    return loss.item()


def _for_every_token(labels: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Label rows [B, columns] for outputs [B, width], or [B, L, columns] for [B, L, width]."""
    if output.ndim == 2:
        return labels
    return labels.unsqueeze(1).expand(-1, output.shape[1], -1)
