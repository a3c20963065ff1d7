"""The one training loop of all small pipelines: transformer and text encoders together."""

import json
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from tqdm.auto import tqdm

from benchmark.small.checkpoints import load_state, replace_directory, save_atomic
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.grids import clip_rows, save_grid
from benchmark.small.saving import save_pipeline
from benchmark.small.splits import read_entries

__all__ = ["TrainingConfig", "train"]

FIRST_EXPORT = 100


def train(
    family: SmallFamily,
    work_dir: Path,
    vae: ModelMixin,
    config: TrainingConfig,
    device: str = "cpu",
) -> DiffusionPipeline:
    """Trains, or resumes, and returns the pipeline with the averaged weights.

    `work_dir` receives the encoded examples, and named after the family: NAME.pt (the checkpoint),
    NAME_loss.jsonl, the directory NAME_samples with validation pictures, and the latest pipeline,
    NAME_pipeline_latest. A resumed training draws the same batches as an uninterrupted one.
    """
    torch.manual_seed(config.seed)
    pipeline, averaged = (family.build_pipeline(vae).to(device) for _ in range(2))
    model = _trained_parts(family, pipeline).train()
    average = _trained_parts(family, averaged).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    kept = {"model": model, "average": average, "optimizer": optimizer}
    checkpoint = work_dir / f"{family.name}.pt"
    if checkpoint.exists():
        state = load_state(checkpoint)
        for name, part in kept.items():
            part.load_state_dict(state[name])
        step, elapsed = state["step"], state["elapsed"]
    else:
        step, elapsed = 0, 0.0
        if family.warm_up is not None:
            family.warm_up(pipeline)
        average.load_state_dict(model.state_dict())

    def save() -> None:
        states = {name: part.state_dict() for name, part in kept.items()}
        save_atomic({**states, "step": step, "elapsed": elapsed}, checkpoint)

    save()
    examples = family.load_examples(
        pipeline, config.examples, config.seed, work_dir / family.latents
    )
    if config.compile:
        compile_blocks(getattr(pipeline, family.trained[0]))

    saved = exported = time.monotonic()
    losses: list[float] = []
    progress = tqdm(total=100, desc=family.name, unit="%")
    while (fraction := config.fraction(step, elapsed)) < 1:
        started = time.monotonic()
        learning_rate = config.learning_rate_at(step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batch = examples.batch(config.batch_size, config.empty_share, generator, device)
        loss = family.loss(model, batch)
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
            with loss_log(family, work_dir).open("a") as file:
                file.write(json.dumps({**record, "lr": round(learning_rate, 7)}) + "\n")
            progress.set_postfix(step=step, loss=mean)
            progress.update(int(100 * fraction) - progress.n)
        now = time.monotonic()
        if now - saved > 60 * config.checkpoint_minutes:
            save()
            saved = now
        if step == FIRST_EXPORT or now - exported > 60 * config.export_minutes:
            export(family, averaged, work_dir, step)
            exported = now
    save()
    export(family, averaged, work_dir, step)
    progress.close()
    return averaged


def compile_blocks(transformer: ModelMixin) -> None:
    """Compiles the denoiser's blocks, which share their compiled code, for each shape."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(dynamic=False)
        return
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)


def loss_log(family: SmallFamily, work_dir: Path) -> Path:
    """The file with a line of step, minutes, loss and learning rate for every 20 steps."""
    return work_dir / f"{family.name}_loss.jsonl"


def export(family: SmallFamily, pipeline: DiffusionPipeline, work_dir: Path, step: int) -> None:
    """Saves the pipeline as NAME_pipeline_latest, and pictures of development prompts."""
    latest = work_dir / f"{family.name}_pipeline_latest"
    replace_directory(latest, lambda path: save_pipeline(pipeline, path))
    entries = read_entries(family.name, "development", 4 if family.clips else 16)
    images = family.generate(pipeline, entries.texts, entries.seeds, steps=20)
    pictures = clip_rows(images) if family.clips else images
    save_grid(pictures, work_dir / f"{family.name}_samples" / f"{step:06d}.png")


def _trained_parts(family: SmallFamily, pipeline: DiffusionPipeline) -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(pipeline, name) for name in family.trained})
