"""What each picture of a row scores, so that rows can be compared picture by picture."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmark.score.clips import clip_psnr_db
from benchmark.score.pictures import psnr_db
from benchmark.score.scoring import Scorer

RESAMPLES = 400
"""Draws of pictures, with repetition, behind every confidence band."""


def draws(number: int) -> Tensor:
    """Which of ``number`` pictures each resample takes, int64 [RESAMPLES, number]: always the same
    ones, so that two rows are compared on the same pictures in every resample."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(number, (RESAMPLES, number), generator=generator)


def _ssim(pictures: Tensor, reference: Tensor) -> list[float]:
    """Of every picture [N, 3, H, W], or of every clip [N, F, 3, H, W] the mean over its frames."""
    return [
        float(
            structural_similarity_index_measure(
                a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]), data_range=1.0
            )
        )
        for a, b in zip(pictures, reference, strict=True)
    ]


def samples(
    scorer: Scorer, pictures: Tensor, reference: Tensor | None, ode: Tensor | None
) -> dict[str, list[float]]:
    """Scores of each picture, and the distances of `draws` of the pictures.

    Without a reference, an ODE solution or a classifier what needs it is left out.
    """
    found: dict[str, list[float]] = {}
    psnr = clip_psnr_db if scorer.clips else psnr_db
    for suffix, other in (("", reference), ("_ode", ode)):
        if other is not None:
            found[f"psnr{suffix}"] = [round(value, 3) for value in psnr(pictures, other)]
            found[f"ssim{suffix}"] = [round(value, 5) for value in _ssim(pictures, other)]
    if scorer.judge is None:
        return found
    found["prompt_accuracy"] = [
        scorer.judging.accuracy(scorer.judge, picture[None], [prompt])["whole"]
        for picture, prompt in zip(pictures, scorer.prompts, strict=True)
    ]
    if len(pictures) > 1:
        distances = resampled_distances(scorer.features_of(pictures), scorer.real)
        found[scorer.distance] = [round(distance, 4) for distance in distances.tolist()]
    return found


def resampled_distances(features: Tensor, reference: Tensor) -> Tensor:
    """`metrics.frechet_distance` of every resample of features [N, F], float64 [RESAMPLES].

    With R R = S2 the eigenvalues of S1 S2 are those of R S1 R, which is symmetric.
    """
    drawn, reference = features.double()[draws(len(features))], reference.double()
    means = drawn.mean(dim=1)
    centred = drawn - means[:, None]
    s1 = centred.mT @ centred / (len(features) - 1)
    s2 = torch.cov(reference.T)
    values, vectors = torch.linalg.eigh(s2)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ s1 @ root).clamp(min=0).sqrt().sum(dim=1)
    offsets = (means - reference.mean(dim=0)).square().sum(dim=1)
    traces = s1.diagonal(dim1=1, dim2=2).sum(dim=1) + s2.trace()
    return offsets + traces - 2 * products
