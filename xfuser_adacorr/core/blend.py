"""Blending cached and fresh outputs after the fact, and compensating what was applied instead."""

from collections.abc import Sequence

from torch import Tensor

CURVATURE_MAX_GAP_RATIO = 4.0
"""Gap over previous gap above which the third node would bend the blend more than it knows."""


def blend_weights(
    sigma: float, sigma0: float, sigma_fresh: float, sigma1: float | None = None
) -> tuple[float, float, float]:
    """Weights ``(b0, b1, b)`` of ``b0 * V0 + b1 * V1 + b * v`` for a call skipped at ``sigma``.

    ``V0`` (at ``sigma0``) is the refresh before the skipped call, ``v`` (at ``sigma_fresh``) that
    after it. Without ``sigma1`` the blend is linear: ``(1 - w, 0, w)`` with
    ``w = (sigma0 - sigma) / (sigma0 - sigma_fresh)`` in [0, 1]; with ``sigma1`` it is the parabola
    through the three refreshes (Lagrange's form).
    """
    if sigma1 is None:
        w = (sigma0 - sigma) / (sigma0 - sigma_fresh)
        return 1.0 - w, 0.0, w
    b0 = (sigma - sigma1) * (sigma - sigma_fresh) / ((sigma0 - sigma1) * (sigma0 - sigma_fresh))
    b1 = (sigma - sigma0) * (sigma - sigma_fresh) / ((sigma1 - sigma0) * (sigma1 - sigma_fresh))
    b = (sigma - sigma0) * (sigma - sigma1) / ((sigma_fresh - sigma0) * (sigma_fresh - sigma1))
    return b0, b1, b


def curvature_node(sigma_fresh: float, sigma0: float, sigma1: float | None) -> float | None:
    """``sigma1`` where a parabola through the three refreshes can be trusted, else None."""
    if sigma1 is None:
        return None
    trusted = abs(sigma_fresh - sigma0) < CURVATURE_MAX_GAP_RATIO * abs(sigma0 - sigma1)
    return sigma1 if trusted else None


def displacement_weights(
    sigmas: Sequence[float],
    applied: Sequence[tuple[float, float]],
    sigma_fresh: float,
    sigma0: float,
    sigma1: float | None,
) -> tuple[float, float, float]:
    """Weights of ``V0, V1, v`` in what the skipped calls still owe the latents.

    ``sum_j dsigma_j * (blend_j - forecast_j)`` for an Euler step ``x <- x + dsigma * out``: the
    skipped calls stood at ``sigmas``; ``applied[j] = (a0, a1)`` was used there (`line_weights`).
    """
    third_node = curvature_node(sigma_fresh, sigma0, sigma1)
    ends = [*sigmas[1:], sigma_fresh]
    d0 = d1 = d = 0.0
    for sigma, end, (a0, a1) in zip(sigmas, ends, applied, strict=True):
        b0, b1, b = blend_weights(sigma, sigma0, sigma_fresh, third_node)
        d0 += (end - sigma) * (b0 - a0)
        d1 += (end - sigma) * (b1 - a1)
        d += (end - sigma) * b
    return d0, d1, d


def blend(cached: Tensor, fresh: Tensor, weight: Tensor | float) -> Tensor:
    """AdaCorrection's blend ``(1 - w) * cached + w * fresh``, w in [0, 1]."""
    return (1.0 - weight) * cached + weight * fresh
