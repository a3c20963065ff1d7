"""Forecasts: what stands in for an output that is not computed."""


def line_weights(sigma: float, sigma0: float, sigma1: float | None) -> tuple[float, float]:
    """Weights ``(a0, a1)`` of ``a0 * V0 + a1 * V1``, the line through the last two refreshes.

    ``V0`` was computed at ``sigma0``, ``V1`` before it at ``sigma1``. With one refresh only
    (``sigma1 is None``) the forecast is the last value: ``(1, 0)``.
    """
    if sigma1 is None:
        return 1.0, 0.0
    r = (sigma - sigma0) / (sigma0 - sigma1)
    return 1.0 + r, -r
