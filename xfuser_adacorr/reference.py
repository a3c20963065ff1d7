"""AdaCorrection on Euler steps, on one page: what the tests compare the engine with."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt

from torch import Tensor


def sample(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    *,
    tolerance: float = 0.004,
    gamma: float = 1.0,
    lambda_: float = 1.0,
) -> tuple[Tensor, list[int]]:
    """Sample with ``x <- x + (s_next - s) * velocity(x, s)``, computing few of the velocities.

    ``x`` is pure noise as tokens ``[B, N, C]``, ``sigmas`` fall from 1 to 0, one more than there
    are steps. Returns the sample, and the indices of the steps that were computed.
    """
    v0 = v1 = kappa = gap = None  # last two computed outputs, error per drift, steps between them
    s0 = s1 = speed = error = 0.0
    x0, deviation0 = x, deviation(x)  # latents of the last refresh
    keep, skipped, computed = 1.0, [], []  # share of the line's slope; [(s, s_next, forecast)]
    misses = 0  # refreshes in a row that found the forecast wrong by almost the output's size
    last = len(sigmas) - 2
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        line = v0 if v1 is None else v0 + keep * (s - s0) / (s0 - s1) * (v0 - v1)
        drift = expected = None
        compute = v0 is None
        if not compute:  # offset estimation: how far has the forecast probably drifted?
            drift = float((x - x0).norm() / x0.norm())
            spatial = abs(deviation(x) - deviation0) / deviation0
            if kappa is None:
                share = max(drift, abs(s - s0)) / (0.5 * sqrt(tolerance))
            else:
                expected = error + kappa * drift * abs(s_next - s) * speed
                share = expected / tolerance
            score = share + lambda_ * spatial
            furthest = (last + 1 - i) / 3 if gap is None else 1.5 * gap
            if i - computed[-1] >= furthest:
                score = max(score, 1.0)
            spared = expected is not None and expected <= tolerance / 3
            compute = gamma * score >= 1.0 or (i == last and not spared)
        if not compute:  # reuse: extrapolate
            error = expected or 0.0
            skipped.append((s, s_next, line))
            x = x + (s_next - s) * line
            continue
        v, given = velocity(x, s), x  # refresh
        if v0 is not None:
            misses = misses + 1 if float((v - line).norm()) >= 0.8 * float(v.norm()) else 0
        if skipped and i < last and misses < 3:  # correction: blends in place of the forecasts
            for sj, sj_next, used in skipped:
                x = x + (sj_next - sj) * (v0 + (s0 - sj) / (s0 - s) * (v - v0) - used)
        if v0 is not None:  # what the refresh found
            kappa = float((v - line).norm() / v.norm()) / drift
            gap = i - computed[-1]
        if v1 is not None:
            predicted, happened = (s - s0) / (s0 - s1) * (v0 - v1), v - v0
            held = 2.0 * float((happened * predicted).sum() / predicted.square().sum())
            keep = 0.5 * keep + 0.5 * min(max(held, 0.0), 1.0)
        speed, x0, deviation0 = float(v.norm() / given.norm()), given, deviation(given)
        v0, v1, s0, s1, error, skipped = v, v0, s, s0, 0.0, []
        computed.append(i)
        x = x + (s_next - s) * v
    return x, computed


def deviation(x: Tensor) -> float:
    """Mean over tokens of the standard deviation over channels, of ``[B, N, C]``."""
    return float(x.std(dim=-1, unbiased=False).mean())
