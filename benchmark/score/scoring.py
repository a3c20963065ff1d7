"""Scores pictures or clips against the uncached run, the ODE's solution and real ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.score.clips import clip_psnr_db, compare_clips
from benchmark.score.judging import Judging
from benchmark.score.perceptual import load_inception, load_lpips
from benchmark.score.pictures import (
    compare,
    frechet_distance,
    frechet_std,
    proportion_error,
    psnr_db,
    spread,
)
from benchmark.settings import Settings

JUDGE_DISTANCE, FID = DISTANCES = ("judge_distance", "fid")
"""Fréchet distances of features: of the small classifier's, and the published one of Inception's.
A run has one of them."""
REAL_SEED = 77
_BATCH = 128


def load_judge(directory: str, judge_class: type) -> Any:
    """The small classifier of a class; `BenchmarkError` if it is missing or cannot be read."""
    if not Path(directory).is_dir():
        raise BenchmarkError(
            f"--judge: no directory {directory}; scripts/train_small.py makes the classifier"
        )
    from benchmark.small.judge import load_judge as load

    try:
        return load(directory, judge_class)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"--judge: {directory} cannot be read: {reason}") from error


def _understands(judging: Judging, texts: Sequence[str]) -> bool:
    try:
        judging.check_texts(texts)
    except ValueError:
        return False
    return True


class Scorer:
    """The networks and the features of real pictures, loaded once a process.

    The judge speaks about pictures or clips of its own size (64x64, 16 frames) and texts of its own
    form alone; for others prompt accuracy and its distance are null, and the Inception distance is
    taken to the uncached pictures.
    """

    def __init__(self, settings: Settings, shape: tuple[int, int], prompts: Sequence[str]) -> None:
        self.judging = FAMILIES[settings.model_type].judging()
        frames = () if settings.num_frames is None else (settings.num_frames,)
        self.clips = bool(frames)
        judged = self.judging.shape == (*frames, 3, *shape) and _understands(self.judging, prompts)
        self.prompts = list(prompts)
        self.judge = load_judge(settings.judge, self.judging.judge_class) if judged else None
        self.lpips = load_lpips(settings.lpips_weights) if settings.lpips_weights else None
        self.distance = FID if settings.inception_weights else JUDGE_DISTANCE
        self.features: Callable[[Tensor], Tensor] | None = self.judge
        if settings.inception_weights:
            self.features = load_inception(settings.inception_weights)
        self.real = None
        if self.judge is not None:
            drawn = self.judging.real(torch.Generator().manual_seed(REAL_SEED))
            self.real = torch.cat([self.features_of(batch) for batch in drawn])

    @torch.no_grad()
    def features_of(self, pictures: Tensor) -> Tensor:
        """Features [N, F] of pictures or clips, by the network of the distance."""
        return torch.cat([self.features(batch) for batch in pictures.split(_BATCH)])

    def score(
        self, pictures: Tensor, reference: Tensor | None, ode: Tensor | None
    ) -> dict[str, Any]:
        """All quality figures of a row; `reference` is None for the uncached row itself."""
        row: dict[str, Any] = {
            "psnr_db": None,
            "psnr_per_picture": None,
            "identical": None,
            "ssim": None,
            "psnr_ode_db": None,
            "lpips": None,
            self.distance: None,
            f"{self.distance}_std": None,
            "prompt_accuracy": None,
            "prompt_accuracy_error": None,
            "attribute_accuracy": None,
        }
        if self.clips:
            row |= {"worst_frame_psnr_db": None, "worst_frame_ssim": None, "temporal_psnr_db": None}
        if ode is not None:
            row["psnr_ode_db"] = spread((clip_psnr_db if self.clips else psnr_db)(pictures, ode))
        if reference is not None:
            row |= (compare_clips if self.clips else compare)(pictures, reference)
            if self.lpips is not None:
                shape = (-1, *pictures.shape[-3:])  # frames are pictures
                distances = self.lpips(pictures.reshape(shape), reference.reshape(shape))
                row["lpips"] = round(float(distances.mean()), 6)
        row |= self._distance(pictures, reference)
        if self.judge is not None:
            with torch.no_grad():
                accuracy = self.judging.accuracy(self.judge, pictures, self.prompts)
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
            features, real = self.features_of(pictures), self.real
        elif reference is not None:
            features, real = self.features_of(pictures), self.features_of(reference)
        else:
            return {}
        found = {self.distance: round(frechet_distance(features, real), 4)}
        if reference is None:
            found[f"{self.distance}_std"] = round(frechet_std(features, real), 4)
        return found


def describe_distance(settings: Settings, scorer: Scorer) -> str:
    """What the distance in a report of these settings is."""
    judged = scorer.judge is not None
    what = "clips" if scorer.clips else "pictures"
    if settings.inception_weights:
        network = "Inception v3 (2048 features)"
    elif judged:
        network = f"the small classifier that was trained on the same {what}"
    else:
        return f"no network: the classifier does not know such {what} or prompts"
    real = scorer.judging.real_text if judged else f"the uncached {what}"
    return f"Fréchet distance of features of {network} to {real}"
