"""Auto: AdaCorrection's own refresh rule, with no base method below it."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Rule, Warmup
from .options import (
    AUTO_TOLERANCE,
    Method,
    check_count,
    check_number,
    check_tolerance,
    error_rule,
    within_budget,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Auto(Method):
    """Refresh where the expected error of the latents asks for it; knows nothing of the model.

    Raises `ValueError` or `TypeError` that names the option and what is accepted.
    """

    label: ClassVar[str] = "Auto"

    tolerance: float | None = None
    """Relative error of the latents tolerated between two refreshes, > 0; None: 0.004."""
    target_compute: float | None = None
    """Share of the steps to be computed, in (0, 1], in place of a tolerance."""
    target_speedup: float | None = None
    """The same as its inverse, >= 1: counted compute, not wall-clock time."""
    gamma: float = 1.0
    """gamma >= 0 in the weight w = clip(gamma * S, 0, 1); 0: never refresh for w."""
    lambda_: float = 1.0
    """lambda >= 0, weight of the spatial term in the offset score S."""
    warmup: int = 0
    """Steps at the start of a run that are always computed (the first one always is)."""
    num_steps: int | None = None
    """Sampling steps of a bare model; None: inferred from the timesteps."""

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_number("lambda_", self.lambda_, least=0)
        check_tolerance(self)
        check_count("warmup", self.warmup, least=0)
        check_count("num_steps", self.num_steps, least=1, optional=True)

    @property
    def needs_steps(self) -> bool:
        return self.target_compute is not None or self.target_speedup is not None

    def make_rule(self, places, inside) -> Rule:
        own = error_rule(self, AUTO_TOLERANCE, places)
        rule = within_budget(own, own)
        return Warmup(rule, self.warmup) if self.warmup else rule
