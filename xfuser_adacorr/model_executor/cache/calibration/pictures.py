"""What a pipeline returned, as tensors, and how near two of them are."""

from typing import Any

import numpy
import torch
from torch import Tensor

PSNR_CAP_DB = 100.0


def psnr(squared_error: Tensor, peak: Tensor) -> Tensor:
    """In dB, at most `PSNR_CAP_DB`."""
    return (10.0 * torch.log10(peak.square() / squared_error)).clamp(max=PSNR_CAP_DB)


def pictures_of(output: Any) -> Tensor:
    """What a pipeline returned first, as float tensors ``[n, ...]``; pictures in [0, 1]."""
    first = next(iter(output.values())) if isinstance(output, dict) else output
    first = first[0] if isinstance(first, tuple) else first
    if isinstance(first, Tensor):
        return first.detach().float().cpu()
    if isinstance(first, numpy.ndarray):
        return torch.from_numpy(first).float()
    parts = [numpy.asarray(_of_frames(each)) for each in first]
    whole = torch.from_numpy(numpy.stack(parts))
    return whole.float() / 255.0 if whole.dtype == torch.uint8 else whole.float()


def _of_frames(picture: Any) -> Any:
    if isinstance(picture, list):  # frames of a clip
        return numpy.stack([numpy.asarray(frame) for frame in picture])
    return picture.cpu() if isinstance(picture, Tensor) else picture
