"""Clip quality: tensor maths on clips [N, F, 3, H, W] in [0, 1]."""

from typing import Any

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmark.score.pictures import psnr_db, spread

DIFFERENCE_RANGE = 2.0
"""Differences of two frames lie in [-1, 1]."""


def frame_psnr_db(clips: Tensor, reference: Tensor) -> list[list[float]]:
    """`metrics.psnr_db` of every frame, a list for each clip.

    Raises:
        TypeError: integer clips.
        ValueError: different shapes.
    """
    values = psnr_db(clips.flatten(0, 1), reference.flatten(0, 1))
    frames = clips.shape[1]
    return [values[first : first + frames] for first in range(0, len(values), frames)]


def clip_psnr_db(clips: Tensor, reference: Tensor) -> list[float]:
    """Mean over the frames of their PSNR, of each clip."""
    return [sum(frames) / len(frames) for frames in frame_psnr_db(clips, reference)]


def temporal_psnr_db(clips: Tensor, reference: Tensor) -> list[float]:
    """PSNR of each clip's frame differences ``x[t+1] - x[t]`` against the reference's.

    ``10 log10(2^2 / MSE)``, since differences range over [-1, 1]; at most the cap of
    `metrics.psnr_db`. Flicker lowers it, an error that stays the same in all frames does not.

    Raises:
        TypeError: integer clips.
        ValueError: different shapes, or clips of one frame.
    """
    if clips.shape[1] < 2:
        raise ValueError(f"clips need at least two frames, got {list(clips.shape)}")
    return psnr_db(clips.diff(dim=1), reference.diff(dim=1), data_range=DIFFERENCE_RANGE)


def compare_clips(clips: Tensor, reference: Tensor) -> dict[str, Any]:
    """What `metrics.compare` says of pictures, frame by frame, and what only clips have.

    ``psnr_db`` and ``ssim`` are means over the frames, ``worst_frame_...`` those of each clip's
    worst frame; spreads are over the clips.
    """
    frames = frame_psnr_db(clips, reference)
    means = [sum(values) / len(values) for values in frames]
    ssim = structural_similarity_index_measure(
        clips.flatten(0, 1), reference.flatten(0, 1), data_range=1.0, reduction="none"
    ).view(len(clips), -1)
    same = (clips == reference).flatten(1).all(dim=1)
    return {
        "psnr_db": spread(means),
        "psnr_per_picture": [round(value, 3) for value in means],
        "identical": int(same.sum()),
        "ssim": round(float(ssim.mean()), 6),
        "worst_frame_psnr_db": spread([min(values) for values in frames]),
        "worst_frame_ssim": round(float(ssim.amin(dim=1).mean()), 6),
        "temporal_psnr_db": spread(temporal_psnr_db(clips, reference)),
    }
