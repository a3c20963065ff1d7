"""What training needs to know of a small pipeline, and its budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, ModelMixin
from torch import nn

from benchmark.models.families import FAMILIES, Request
from benchmark.small import autoencoder, clip_autoencoder


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long and how the transformer is trained."""

    minutes: float | None = 58.0
    """Time budget, summed over resumed runs; None where `steps` decides."""

    steps: int | None = None
    """Step budget; the first of both budgets to run out ends the training."""

    batch_size: int = 32
    """Pictures or clips in a step."""

    examples: int = 40_000
    """Pictures or clips that are drawn and encoded once before the training."""

    learning_rate: float = 1.5e-3
    """Peak of the cosine schedule, after `warm_up` steps."""

    warm_up: int = 100
    """Steps of linear warm-up."""

    empty_share: float = 0.1
    """Share of prompts or classes replaced by the empty one, for classifier-free guidance."""

    ema_decay: float = 0.996
    """Decay of the averaged weights, which are the ones that are exported."""

    seed: int = 0
    """Seed of weights, data and noise."""

    compile: bool = True
    """Compiles the transformer's blocks."""

    checkpoint_minutes: float = 3.0
    """Minutes between checkpoints."""

    export_minutes: float = 8.0
    """Minutes between exported pipelines and validation pictures; the first comes early."""

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("minutes and steps are both None: one of them must be given")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def fraction(self, step: int, elapsed: float) -> float:
        """The used share of the budget after `step` steps and `elapsed` seconds."""
        by_time = elapsed / (60 * self.minutes) if self.minutes else 0.0
        by_steps = step / self.steps if self.steps else 0.0
        return max(by_time, by_steps)

    def learning_rate_at(self, step: int, fraction: float) -> float:
        """Linear warm-up, then a cosine down to 1 % at the budget's end."""
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction))
        return self.learning_rate * cosine * min(1.0, (step + 1) / self.warm_up)


class Examples(Protocol):
    """Encoded pictures or clips with their conditions."""

    def batch(self, size: int, empty_share: float, generator: torch.Generator, device: str) -> Any:
        """Draws one step's tensors; `empty_share` of the conditions become the empty one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoding:
    """How an autoencoder is trained and measured."""

    model_class: type[ModelMixin]
    train: Callable[..., ModelMixin]
    """(work_dir, steps, seed=, device=) -> a trained autoencoder."""
    refine: Callable[[Any, Path, int], ModelMixin]
    """(autoencoder, work_dir, steps) -> the same, its decoder trained for longer."""
    psnr: Callable[[Any], float]
    """Mean PSNR in dB over fresh pictures or clips."""


PICTURES = Autoencoding(
    model_class=AutoencoderKL,
    train=autoencoder.train_autoencoder,
    refine=autoencoder.refine_decoder,
    psnr=autoencoder.reconstruction_psnr,
)
CLIPS = Autoencoding(
    model_class=AutoencoderKLWan,
    train=clip_autoencoder.train_autoencoder,
    refine=clip_autoencoder.refine_decoder,
    psnr=clip_autoencoder.reconstruction_psnr,
)
"""In space and time; a family of clips may as well have the one of pictures, frame by frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallFamily:
    """One small pipeline: how it is built, trained, called and judged."""

    name: str
    """As the benchmark's `--model_type` has it."""

    trained: tuple[str, ...]
    """The pipeline's components that are trained together; the denoiser comes first."""

    config: TrainingConfig
    """The usual budget."""

    latents: str
    """Name of the file of encoded examples."""

    build_pipeline: Callable[[Any], DiffusionPipeline]
    """A pipeline around the trained autoencoder, everything else untrained."""

    load_examples: Callable[[DiffusionPipeline, int, int, Path], Examples]
    """Draws and encodes a number of examples with a seed, or reads what a call left in a file."""

    loss: Callable[[nn.ModuleDict, Any], torch.Tensor]
    """The trained components and a batch -> the loss."""

    accuracy: Callable[[Any, torch.Tensor, Sequence[str]], dict[str, float]]
    """The judge, what was generated, and the texts -> shares `attributes` and `whole`."""

    autoencoding: Autoencoding = PICTURES
    """What the pipeline is built around."""

    warm_up: Callable[[DiffusionPipeline], object] | None = None
    """What happens once before the training, or None."""

    clips: bool = False
    """Whether clips are generated, not pictures."""

    @torch.no_grad()
    def generate(
        self,
        pipeline: DiffusionPipeline,
        texts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """Pictures [N, 3, 64, 64] or clips [N, F, 3, 64, 64] in [0, 1], float32 on the CPU.

        Each has noise from its own seed, so that batches do not matter. FLUX's guidance is the true
        one, by the empty prompt.
        """
        pipeline.set_progress_bar_config(disable=True)
        family = FAMILIES[self.name]
        generated, size = [], 4 if self.clips else 32
        for first in range(0, len(texts), size):
            batch = slice(first, first + size)
            asked = Request(
                text=list(texts[batch]),
                height=64,
                width=64,
                num_frames=family.num_frames,
                guidance_scale=guidance_scale,
                true_cfg_scale=guidance_scale,
            )
            output = pipeline(
                **family.call(pipeline, asked),
                num_inference_steps=steps,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]],
                output_type="pt",
            )
            generated.append(output[0].float().cpu())
        return torch.cat(generated)
