"""DiCache (arXiv 2508.17356): the first block probes, and says how far to follow the residuals."""

from typing import Any

from torch import Tensor

from benchmark.peers.block_stack import enabled_residual

GAMMA = (1.0, 1.5)
"""Bounds of the extrapolation in its code."""


def relative_l1(x: Tensor, before: Tensor) -> float:
    return float((x - before).abs().mean() / before.abs().mean())


class DiCache:
    """
    Args:
        threshold: of the summed relative changes of the probe since the last computed step.
        retained: share of the steps that are computed at the start.
        steps: of the run.
    """

    depth = 1

    def __init__(self, *, threshold: float, retained: float, steps: int) -> None:
        self.threshold, self.retained, self.steps = threshold, retained, steps
        self.summed = 0.0
        self.probe: Tensor | None = None
        self.residuals: list[Tensor] = []
        self.probe_residuals: list[Tensor] = []

    def reused(self, step: int, hidden_states: Tensor, probed: Tensor) -> Tensor | None:
        before, self.probe = self.probe, probed
        if step <= int(self.retained * self.steps) or step == self.steps - 1:
            self.summed = 0.0
            return None
        self.summed += relative_l1(probed, before)
        if self.summed >= self.threshold:
            self.summed = 0.0
            return None
        return hidden_states + self.residual(probed - hidden_states)

    def residual(self, probe_residual: Tensor) -> Tensor:
        """``R_a + gamma (R_b - R_a)`` of the last two computed steps a and b."""
        if len(self.residuals) < 2:
            return self.residuals[-1]
        (old, new), (old_probe, new_probe) = self.residuals, self.probe_residuals
        changed = (probe_residual - old_probe).abs().mean() / (new_probe - old_probe).abs().mean()
        return old + changed.clamp(*GAMMA) * (new - old)

    def computed(self, step: int, hidden_states: Tensor, probed: Tensor, output: Tensor) -> None:
        self.residuals = [*self.residuals, output - hidden_states][-2:]
        self.probe_residuals = [*self.probe_residuals, probed - hidden_states][-2:]


def _make(options: dict[str, Any], run: Any) -> DiCache:
    return DiCache(**options, steps=run.num_inference_steps)


ENABLE = {"DiCache": enabled_residual(_make)}
