"""The stages from nothing to a saved pipeline and judge; each resumes from its own file."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from benchmark.small.card import training_document
from benchmark.small.checkpoints import replace_directory
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.evaluation import accuracy_table, read_loss_log, write_card_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.judge import Judge, load_judge, save_judge
from benchmark.small.judge_training import judge_accuracy, train_clip_judge, train_judge
from benchmark.small.memory import keep_freed_memory
from benchmark.small.saving import save_pipeline
from benchmark.small.splits import split_file, write_splits
from benchmark.small.training import loss_log, train

logger = logging.getLogger(__name__)

DOCUMENTS = (".md", ".png", ".svg")


def train_pipeline(
    family: SmallFamily,
    *,
    output: Path,
    judge_output: Path,
    work_dir: Path,
    config: TrainingConfig,
    autoencoder_steps: int,
    decoder_steps: int,
    device: str = "cpu",
    autoencoder: Path | None = None,
) -> None:
    """Trains autoencoder, judge, decoder and transformer, and saves pipeline and judge.

    Families that share a `work_dir` share its autoencoders and decoders.

    Args:
        family: which pipeline.
        output: the directory of the pipeline, replaced as a whole at the end (its model card and
            pictures are kept).
        judge_output: the directory of the pictures' judge, or of the clips' judge where the family
            makes clips. A judge that is there already is used as it is.
        work_dir: checkpoints, latents, logs and validation pictures.
        config: the transformer's training.
        autoencoder_steps: steps of the whole autoencoder, before everything else.
        decoder_steps: further steps of its decoder alone, which leave the latents as they are.
        device: where to train.
        autoencoder: the directory of a trained one, which is used as it is.

    Raises:
        FileNotFoundError: there is no judge, and the autoencoder of clips trains none.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if not split_file(family.name).exists():
        write_splits(family.name)
    torch.manual_seed(config.seed)
    coding = family.autoencoding
    if autoencoder is None:
        vae = coding.train(work_dir, autoencoder_steps, seed=config.seed, device=device)
    else:
        vae = coding.model_class.from_pretrained(autoencoder)
        vae = vae.to(device).eval().requires_grad_(False)
    logger.info("autoencoder: PSNR %.2f dB", coding.psnr(vae))
    judge, own_accuracy = _judge(family, work_dir, vae, judge_output)
    logger.info("judge: %s", own_accuracy)
    if autoencoder is None:
        coding.refine(vae, work_dir, decoder_steps)
    psnr_db = coding.psnr(vae)
    logger.info("refined decoder: PSNR %.2f dB", psnr_db)

    pipeline = train(family, work_dir, vae, config, device=device).to("cpu")
    _save_beside_documents(pipeline, output)
    records = read_loss_log(loss_log(family, work_dir))
    write_card_pictures(family, pipeline, records, output)
    rows = accuracy_table(family, pipeline, judge)
    (work_dir / f"{family.name}_accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        logger.info("%s", row)
    document = training_document(pipeline, records, rows, psnr_db, own_accuracy)
    (output / "TRAINING.md").write_text(document)


def _judge(
    family: SmallFamily, work_dir: Path, vae: ModelMixin, output: Path
) -> tuple[Any, dict[str, float]]:
    """The family's judge and its accuracy on fresh examples."""
    judge_class = ClipJudge if family.clips else Judge
    if (output / "judge.safetensors").exists() or not isinstance(vae, AutoencoderKL):
        judge = load_judge(output, judge_class)
    elif family.clips:
        judge = train_clip_judge(work_dir, vae, _picture_judge(work_dir, vae, output.parent))
        save_judge(judge, output)
    else:
        judge = train_judge(work_dir, vae)
        save_judge(judge, output)
    return judge, judge_accuracy(judge, number=300 if family.clips else 2000)


def _picture_judge(work_dir: Path, vae: AutoencoderKL, parent: Path) -> Judge:
    """What the judge of clips starts from: the one beside it, or a new one."""
    path = parent / "judge"
    if not (path / "judge.safetensors").exists():
        save_judge(train_judge(work_dir, vae), path)
    return load_judge(path)


def _save_beside_documents(pipeline: DiffusionPipeline, output: Path) -> None:
    documents = {
        path.name: path.read_bytes() for path in output.glob("*") if path.suffix in DOCUMENTS
    }

    def write(fresh: Path) -> None:
        save_pipeline(pipeline, fresh)
        for name, content in documents.items():
            (fresh / name).write_bytes(content)

    replace_directory(output, write)
    logger.info("saved %s", output)
