"""Scores a row's pictures against the uncached run, the ODE's solution and real pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.metrics import (
    compare,
    frechet_distance,
    frechet_std,
    proportion_error,
    psnr_db,
    spread,
)
from benchmark.perceptual import load_inception, load_lpips
from benchmark.settings import BenchmarkError, Settings

REAL_PICTURES = 1024
REAL_SEED = 77
_BATCH = 128


def load_judge(directory: str) -> Any:
    """The small classifier; `BenchmarkError` if it is missing or cannot be read."""
    if not Path(directory).is_dir():
        raise BenchmarkError(
            f"--judge: no directory {directory}; scripts/train_small.py makes the classifier"
        )
    from benchmark.small.judge import load_judge as load

    try:
        return load(directory)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"--judge: {directory} cannot be read: {reason}") from error


def _are_scenes(prompts: Sequence[str]) -> bool:
    from benchmark.small.scenes import parse_prompt

    try:
        return bool([parse_prompt(prompt) for prompt in prompts])
    except ValueError:
        return False


def real_pictures() -> Tensor:
    """Rendered pictures of fresh random prompts: what the small pipelines were trained to make."""
    from benchmark.small.pictures import render
    from benchmark.small.scenes import sample_labels

    generator = torch.Generator().manual_seed(REAL_SEED)
    return render(sample_labels(REAL_PICTURES, generator), generator)


class Scorer:
    """The networks and the real pictures, loaded once a process.

    The judge speaks about pictures of its own size (64x64) and prompts of its own form alone; for
    others prompt accuracy and its distance are null, and the Inception distance is taken to the
    uncached pictures.
    """

    def __init__(self, settings: Settings, shape: tuple[int, int], prompts: Sequence[str]) -> None:
        judged = shape == (64, 64) and _are_scenes(prompts)
        self.prompts = list(prompts)
        self.judge = load_judge(settings.judge) if judged else None
        self.lpips = load_lpips(settings.lpips_weights) if settings.lpips_weights else None
        self.features: Callable[[Tensor], Tensor] | None = self.judge
        if settings.inception_weights:
            self.features = load_inception(settings.inception_weights)
        self.real = self._extract(real_pictures()) if self.judge and self.features else None

    @torch.no_grad()
    def _extract(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.features(batch) for batch in pictures.split(_BATCH)])

    def score(
        self,
        pictures: Tensor,
        reference: Tensor | None,
        ode: Tensor | None,
    ) -> dict[str, Any]:
        """All quality figures of a row; `reference` is None for the uncached row itself."""
        row: dict[str, Any] = {
            "psnr_db": None,
            "psnr_per_picture": None,
            "identical": None,
            "ssim": None,
            "psnr_ode_db": ode if ode is None else spread(psnr_db(pictures, ode)),
            "lpips": None,
            "fid": None,
            "fid_std": None,
            "prompt_accuracy": None,
            "prompt_accuracy_error": None,
            "attribute_accuracy": None,
        }
        if reference is not None:
            row |= compare(pictures, reference)
            if self.lpips is not None:
                row["lpips"] = round(float(self.lpips(pictures, reference).mean()), 6)
        row |= self._distance(pictures, reference)
        if self.judge is not None:
            with torch.no_grad():
                accuracy = self.judge.prompt_accuracy(pictures, self.prompts)
            row["prompt_accuracy"] = round(accuracy["whole"], 4)
            row["prompt_accuracy_error"] = round(
                proportion_error(accuracy["whole"], len(pictures)), 4
            )
            row["attribute_accuracy"] = round(accuracy["attributes"], 4)
        return row

    def _distance(self, pictures: Tensor, reference: Tensor | None) -> dict[str, float]:
        if self.features is None or len(pictures) < 2:
            return {}
        if self.real is not None:
            features, real = self._extract(pictures), self.real
        elif reference is not None:
            features, real = self._extract(pictures), self._extract(reference)
        else:
            return {}
        distance = {"fid": round(frechet_distance(features, real), 4)}
        if reference is None:
            distance["fid_std"] = round(frechet_std(features, real), 4)
        return distance


def describe_distance(settings: Settings, judged: bool) -> str:
    """What "FID" in a report of these settings is."""
    if settings.inception_weights:
        network = "Inception v3 (2048 features)"
    elif judged:
        network = "the small classifier that was trained on the same pictures"
    else:
        return "no network: the classifier does not know such pictures or prompts"
    real = (
        f"{REAL_PICTURES} rendered pictures of random prompts"
        if judged
        else "the uncached pictures"
    )
    return f"Fréchet distance of features of {network} to {real}"
