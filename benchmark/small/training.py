"""Flow-matching training of the small FLUX transformer together with its text encoders."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.checkpoints import load_state, replace_directory, save_atomic
from benchmark.small.flux import build_pipeline, generate, image_ids, save_pipeline
from benchmark.small.grids import save_grid
from benchmark.small.latents import Batch, load_latent_set
from benchmark.small.splits import read_split
from benchmark.small.text import warm_up_text_encoders

FIRST_EXPORT = 100
TRAINED = ("transformer", "text_encoder", "text_encoder_2")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How long and how the transformer is trained."""

    minutes: float | None = 132.0
    """Time budget, summed over resumed runs; None where `steps` decides."""

    steps: int | None = None
    """Step budget; the first of both budgets to run out ends the training."""

    batch_size: int = 32
    """Pictures in a step."""

    pictures: int = 40_000
    """Pictures that are drawn and encoded once before the training."""

    learning_rate: float = 1.5e-3
    """Peak of the cosine schedule, after `warm_up` steps."""

    warm_up: int = 100
    """Steps of linear warm-up."""

    empty_share: float = 0.1
    """Share of prompts replaced by the empty one, for classifier-free guidance."""

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


def train_flux(
    work_dir: Path, vae: AutoencoderKL, config: TrainingConfig, device: str = "cpu"
) -> FluxPipeline:
    """Trains, or resumes, and returns the pipeline with the averaged weights.

    `work_dir` receives `latents.pt`, `flux.pt` (the checkpoint), `flux_loss.jsonl`, the directory
    `samples` with validation pictures and the latest pipeline, `flux_pipeline_latest`.
    """
    torch.manual_seed(config.seed)
    pipeline, averaged = build_pipeline(vae).to(device), build_pipeline(vae).to(device)
    model = _trained_parts(pipeline).train()
    average = _trained_parts(averaged).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    kept = {"model": model, "average": average, "optimizer": optimizer}
    checkpoint = work_dir / "flux.pt"
    if checkpoint.exists():
        state = load_state(checkpoint)
        for name, part in kept.items():
            part.load_state_dict(state[name])
        step, elapsed = state["step"], state["elapsed"]
    else:
        step, elapsed = 0, 0.0
        warm_up_text_encoders(pipeline)
        average.load_state_dict(model.state_dict())

    def save() -> None:
        states = {name: part.state_dict() for name, part in kept.items()}
        save_atomic({**states, "step": step, "elapsed": elapsed}, checkpoint)

    save()
    data = load_latent_set(pipeline, vae, config.pictures, config.seed, work_dir / "latents.pt")
    positions = image_ids(16, 16).to(device)
    if config.compile:
        pipeline.transformer.compile_repeated_blocks()

    saved = exported = time.monotonic()
    losses: list[float] = []
    progress = tqdm(total=100, desc="flux", unit="%")
    while (fraction := config.fraction(step, elapsed)) < 1:
        started = time.monotonic()
        learning_rate = config.learning_rate_at(step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch = data.batch(config.batch_size, config.empty_share, generator, device)
        loss = flow_loss(model, batch, positions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        step += 1
        elapsed += time.monotonic() - started
        if step % 20 == 0:
            mean = round(sum(losses) / len(losses), 5)
            losses.clear()
            record = {"step": step, "minutes": round(elapsed / 60, 2), "loss": mean}
            with (work_dir / "flux_loss.jsonl").open("a") as file:
                file.write(json.dumps({**record, "lr": round(learning_rate, 7)}) + "\n")
            progress.set_postfix(step=step, loss=mean)
            progress.update(int(100 * fraction) - progress.n)
        now = time.monotonic()
        if now - saved > 60 * config.checkpoint_minutes:
            save()
            saved = now
        if step == FIRST_EXPORT or now - exported > 60 * config.export_minutes:
            export(averaged, work_dir, step)
            exported = now
    save()
    export(averaged, work_dir, step)
    progress.close()
    return averaged


def flow_loss(model: nn.ModuleDict, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted velocity, with the pipeline's own arguments."""
    sequence = model["text_encoder_2"](batch.t5_ids)[0]
    velocity = model["transformer"](
        hidden_states=batch.noisy,
        encoder_hidden_states=sequence,
        pooled_projections=model["text_encoder"](batch.clip_ids).pooler_output,
        timestep=batch.sigma,
        img_ids=positions,
        txt_ids=sequence.new_zeros(sequence.shape[1], 3),
        return_dict=False,
    )[0]
    return (velocity - batch.velocity).square().mean()


def export(pipeline: FluxPipeline, work_dir: Path, step: int) -> None:
    """Saves the pipeline as `flux_pipeline_latest`, and pictures of development prompts."""
    latest = work_dir / "flux_pipeline_latest"
    replace_directory(latest, lambda path: save_pipeline(pipeline, path))
    entries = read_split("development")[:16]
    prompts, seeds = zip(*((entry["prompt"], entry["seed"]) for entry in entries), strict=True)
    pictures = generate(pipeline, list(prompts), list(seeds), steps=20)
    save_grid(pictures, work_dir / "samples" / f"{step:06d}.png")


def _trained_parts(pipeline: FluxPipeline) -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
