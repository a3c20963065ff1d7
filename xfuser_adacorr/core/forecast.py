"""Forecasts: what stands in for an output that is not computed."""

import torch
from torch import Tensor

DAMPING_MEMORY = 0.5
"""What earlier refreshes count at each further one, in the damping of the line."""


def line_weights(
    sigma: float, sigma0: float, sigma1: float | None, damping: Tensor | float = 1.0
) -> tuple[Tensor | float, Tensor | float]:
    """Weights ``(a0, a1)`` of ``a0 * V0 + a1 * V1``, the line through the last two refreshes.

    ``V0`` was computed at ``sigma0``, ``V1`` before it at ``sigma1``. With one refresh only
    (``sigma1 is None``) the forecast is the last value: ``(1, 0)``. ``damping`` in [0, 1] scales
    the line's slope: at 0 the forecast is the last value too.
    """
    if sigma1 is None:
        return 1.0, 0.0
    r = damping * ((sigma - sigma0) / (sigma0 - sigma1))
    return 1.0 + r, -r


def line_sums(predicted: Tensor, happened: Tensor) -> Tensor:
    """``[<happened, predicted>, ||predicted||^2]``, to be added up over parts of a picture.

    ``predicted`` and ``happened`` are the change since the refresh before as the undamped line has
    it, and as it was.
    """
    return torch.stack([(happened * predicted).sum(), predicted.square().sum()])


def updated_damping(damping: Tensor | float, sums: Tensor) -> Tensor:
    """The damping after a refresh, a scalar in [0, 1] on the device of the `line_sums`.

    The quotient of the two is 1 where the line was right, 1/2 where it was as wrong as the last
    value, and below where it was worse: from 1/2 on the line counts in full, below in proportion,
    averaged with earlier refreshes.
    """
    share = (2.0 * sums[0] / sums[1]).clamp(0.0, 1.0)
    share = torch.where(sums[1] > 0.0, share, 1.0)
    return DAMPING_MEMORY * damping + (1.0 - DAMPING_MEMORY) * share
