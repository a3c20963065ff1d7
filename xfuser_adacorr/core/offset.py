"""Offset estimation: how far a cached output has probably drifted from the true one."""

from dataclasses import dataclass

from .signals import ratio, root_ratio


@dataclass(frozen=True, slots=True)
class Drift:
    """Relative change of a call's input against the input of the last refresh."""

    temporal: float
    """``||x - x_ref|| / ||x_ref||``."""
    spatial: float
    """``|s(x) - s(x_ref)| / s(x_ref)``, s = mean over tokens of the deviation over channels."""

    @classmethod
    def from_sums(cls, difference: float, reference: float, std: float, std_ref: float) -> "Drift":
        """Build from ``||x - x_ref||^2``, ``||x_ref||^2``, and the sums of deviations of both."""
        return cls(root_ratio(difference, reference), ratio(abs(std - std_ref), std_ref))


def error_scale(found_offset: float, temporal: float) -> float | None:
    """kappa: relative error of the forecast per unit of temporal drift, as a refresh found it."""
    return found_offset / temporal if temporal > 0.0 else None


def displacement_error(
    kappa: float, temporal: float, followed: float, velocity_to_latents: float
) -> float:
    """Expected error that one reused call adds to the latents, relative to their norm.

    ``kappa * temporal`` is the relative error of the reused output, ``followed`` how far the
    sampler follows it (flow matching: ``|dsigma|``, else `.schedule.followed`), and
    ``velocity_to_latents = ||v|| / ||x||`` turns it into a share of the latents.
    """
    return kappa * temporal * followed * velocity_to_latents


def offset_score(relative_error: float, spatial: float, lambda_: float) -> float:
    """S: what has drifted over what is tolerated, plus lambda times the spatial term."""
    return relative_error + lambda_ * spatial


def correction_weight(score: float, gamma: float) -> float:
    """w = clip(gamma * S, 0, 1); 1 relies on fresh computation alone."""
    return min(max(gamma * score, 0.0), 1.0)
