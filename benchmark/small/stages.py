"""The stages from nothing to a saved pipeline and judge; each resumes from its own file."""

import json
import logging
from pathlib import Path

import torch
from diffusers import FluxPipeline

from benchmark.small.autoencoder import reconstruction_psnr, refine_decoder, train_autoencoder
from benchmark.small.checkpoints import replace_directory
from benchmark.small.evaluation import accuracy_table, write_card_pictures
from benchmark.small.flux import save_pipeline
from benchmark.small.judge import save_judge
from benchmark.small.judge_training import judge_accuracy, train_judge
from benchmark.small.memory import keep_freed_memory
from benchmark.small.splits import SPLIT_FILE, write_splits
from benchmark.small.training import TrainingConfig, train_flux

logger = logging.getLogger(__name__)


def train_flux_pipeline(
    *,
    output: Path,
    judge_output: Path,
    work_dir: Path,
    config: TrainingConfig,
    autoencoder_steps: int,
    decoder_steps: int,
    device: str = "cpu",
) -> None:
    """Trains autoencoder, judge, transformer and decoder, and saves pipeline and judge.

    Args:
        output: the directory of the pipeline, replaced as a whole at the end (its model card and
            pictures are kept).
        judge_output: the directory of the judge.
        work_dir: checkpoints, latents, logs and validation pictures.
        config: the transformer's training.
        autoencoder_steps: steps of the whole autoencoder, before everything else.
        decoder_steps: further steps of its decoder alone, after the transformer's training.
        device: where to train.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if not SPLIT_FILE.exists():
        write_splits()
    torch.manual_seed(config.seed)
    vae = train_autoencoder(work_dir, autoencoder_steps, seed=config.seed, device=device)
    logger.info("autoencoder: PSNR %.2f dB", reconstruction_psnr(vae))

    judge = train_judge(work_dir, vae)
    save_judge(judge, judge_output)
    logger.info("judge: %s", judge_accuracy(judge))

    pipeline = train_flux(work_dir, vae, config, device=device)
    refine_decoder(vae, work_dir, decoder_steps)
    logger.info("refined decoder: PSNR %.2f dB", reconstruction_psnr(vae))
    _save_beside_documents(pipeline.to("cpu"), output)

    write_card_pictures(pipeline, work_dir / "flux_loss.jsonl", output)
    rows = accuracy_table(pipeline, judge)
    (work_dir / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        logger.info("%(split)s, %(steps)d steps: %(attributes).3f, whole %(whole).3f", row)


def _save_beside_documents(pipeline: FluxPipeline, output: Path) -> None:
    documents = {
        path.name: path.read_bytes()
        for path in output.glob("*")
        if path.suffix in (".md", ".png", ".svg")
    }

    def write(fresh: Path) -> None:
        save_pipeline(pipeline, fresh)
        for name, content in documents.items():
            (fresh / name).write_bytes(content)

    replace_directory(output, write)
    logger.info("saved %s", output)
