"""Calls pipelines with many texts, each with noise from its own seed."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline


@torch.no_grad()
def in_batches(
    pipeline: DiffusionPipeline,
    call: Callable[[list[str], list[torch.Generator]], torch.Tensor],
    texts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
) -> torch.Tensor:
    """What `call` generates for all texts, float32 on the CPU, without progress bars.

    `call` gets the texts of a batch, and for each a generator on the CPU with its seed.
    """
    generated = []
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, len(texts), batch_size):
        batch = slice(first, first + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
        generated.append(call(list(texts[batch]), generators).float().cpu())
    return torch.cat(generated)
