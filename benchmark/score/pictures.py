"""Picture quality: tensor maths on pictures [N, 3, H, W] in [0, 1] and features [N, F]."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

PSNR_CAP_DB = 100.0
"""PSNR of identical pictures, and the most that is reported for any."""


def psnr_db(pictures: Tensor, reference: Tensor, data_range: float = 1.0) -> list[float]:
    """Peak signal-to-noise ratio of each picture in dB, at most 100 dB.

    ``10 log10(data_range^2 / MSE)``, the mean being over all but the first dimension.

    Raises:
        TypeError: integer pictures, whose differences would wrap around.
        ValueError: different shapes.
    """
    if not (pictures.is_floating_point() and reference.is_floating_point()):
        raise TypeError(
            f"pictures must be floating point in [0, 1], got {pictures.dtype}, {reference.dtype}"
        )
    if pictures.shape != reference.shape:
        raise ValueError(f"pictures differ in shape: {pictures.shape} and {reference.shape}")
    errors = (pictures.double() - reference.double()).square().flatten(1).mean(dim=1)
    shares = (errors / data_range**2).tolist()
    return [min(PSNR_CAP_DB, -10 * math.log10(e)) if e > 0 else PSNR_CAP_DB for e in shares]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of the sample, 0 for one value) and minimum."""
    return {
        "mean": round(statistics.fmean(values), 4),
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
        "min": round(min(values), 4),
    }


def compare(pictures: Tensor, reference: Tensor) -> dict[str, Any]:
    """PSNR (spread, per picture) and SSIM against `reference`, and how many are identical."""
    values = psnr_db(pictures, reference)
    ssim = structural_similarity_index_measure(pictures, reference, data_range=1.0)
    same = (pictures == reference).flatten(1).all(dim=1)
    return {
        "psnr_db": spread(values),
        "psnr_per_picture": [round(value, 3) for value in values],
        "identical": int(same.sum()),
        "ssim": round(float(ssim), 6),
    }


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, F], N >= 2.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, in float64.
    """
    features, reference = features.double(), reference.double()
    if min(len(features), len(reference)) < 2:
        raise ValueError("a covariance needs at least two pictures")
    s1, s2 = torch.cov(features.T), torch.cov(reference.T)
    offset = (features.mean(0) - reference.mean(0)).square().sum()
    # The eigenvalues of S1 S2 are real and not negative, but for rounding.
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return float(offset + s1.trace() + s2.trace() - 2 * root)


def frechet_std(features: Tensor, reference: Tensor, resamples: int = 100) -> float:
    """Bootstrap standard deviation of `frechet_distance` over the pictures behind `features`."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(features), (resamples, len(features)), generator=generator)
    return statistics.stdev(frechet_distance(features[draw], reference) for draw in draws)


def proportion_error(share: float, number: int) -> float:
    """Standard error of a proportion seen in `number` pictures."""
    return math.sqrt(share * (1 - share) / number)
