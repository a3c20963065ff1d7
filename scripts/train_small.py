"""Trains a small pipeline from nothing; the same command resumes what was interrupted.

    python scripts/train_small.py --family flux --output benchmark/pipelines/flux \\
        --judge-output benchmark/pipelines/judge --work-dir build/small

Families with one --work-dir share its autoencoder. A judge that --judge-output already holds is
used as it is.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.small.families import NAMES, small_family
from benchmark.small.stages import train_pipeline


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=NAMES, default="flux")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline's directory")
    parser.add_argument(
        "--judge-output",
        type=Path,
        help="default: `judge` beside --output, `clip_judge` for families of clips",
    )
    parser.add_argument(
        "--autoencoder", type=Path, help="a trained one's directory; default: one is trained"
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and latents")
    parser.add_argument(
        "--minutes", type=float, help="of transformer training, default: the family's"
    )
    parser.add_argument("--steps", type=int, help="of transformer training, at most")
    parser.add_argument("--batch-size", type=int, help="default: the family's")
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
    family = small_family(arguments.family)
    judge = "clip_judge" if family.clips else "judge"
    given = {
        name: getattr(arguments, name)
        for name in ("minutes", "steps", "batch_size")
        if getattr(arguments, name) is not None
    }
    train_pipeline(
        family,
        output=arguments.output,
        judge_output=arguments.judge_output or arguments.output.parent / judge,
        work_dir=arguments.work_dir,
        config=dataclasses.replace(
            family.config, seed=arguments.seed, compile=not arguments.no_compile, **given
        ),
        autoencoder_steps=arguments.autoencoder_steps,
        decoder_steps=arguments.decoder_steps,
        device=arguments.device,
        autoencoder=arguments.autoencoder,
    )


if __name__ == "__main__":
    main()
