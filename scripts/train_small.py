"""Trains a small pipeline from nothing; the same command resumes what was interrupted.

    python scripts/train_small.py --family flux --output benchmark/pipelines/flux \\
        --judge-output benchmark/pipelines/judge --work-dir build/small
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.small.stages import train_flux_pipeline
from benchmark.small.training import TrainingConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=["flux"], default="flux")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline's directory")
    parser.add_argument("--judge-output", type=Path, help="default: `judge` beside --output")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and latents")
    parser.add_argument("--minutes", type=float, default=132.0, help="of transformer training")
    parser.add_argument("--steps", type=int, help="of transformer training, at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--autoencoder-steps", type=int, default=2100)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads, default: torch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the blocks")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train_flux_pipeline(
        output=arguments.output,
        judge_output=arguments.judge_output or arguments.output.parent / "judge",
        work_dir=arguments.work_dir,
        config=TrainingConfig(
            minutes=arguments.minutes,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            compile=not arguments.no_compile,
        ),
        autoencoder_steps=arguments.autoencoder_steps,
        decoder_steps=arguments.decoder_steps,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
