"""TC-Pade (arXiv 2603.02943): a rational forecast of the block stack's residual, made for 20 steps.

Formulas and constants are those of its published code.
"""

from typing import Any

import torch
from torch import Tensor

from benchmark.peers.block_stack import enabled_residual

HISTORY = 6
EPSILON = 1e-7


def turning(residuals: list[Tensor]) -> float:
    """Half the distance of the directions of the last two differences, from 0 to 1."""
    first, second = (
        (later - earlier).flatten()
        for earlier, later in zip(residuals[-3:-1], residuals[-2:], strict=True)
    )
    first, second = first / (first.norm() + EPSILON), second / (second.norm() + EPSILON)
    return float(0.5 * (first - second).norm())


def weighted(residuals: list[Tensor], newest: float) -> Tensor:
    return newest * residuals[-1] + (1 - newest) * residuals[-2]


def pade(residuals: list[Tensor], steady: bool) -> Tensor:
    """``(2 d R_n - d R_{n-1}) / (1 - 0.1 d)`` with ``d = exp(-5 |dR| / mean |R|)``, held near by.

    All is element by element. The forecast stays within ``max(|dR| / 2, mean |R| / 10)`` of
    ``0.6 R_n + 0.4 R_{n-1}``, and is blended with that by ``0.7 d + 0.3``.

    Args:
        steady: whether the trajectory does not turn; else the denominator is 1.
    """
    newest, before = residuals[-1], residuals[-2]
    change = (newest - before).abs()
    size = 0.5 * (newest.abs() + before.abs())
    damping = torch.exp(-5.0 * change / (size + EPSILON))
    forecast = damping * (2 * newest - before) / (1 - 0.1 * damping * float(steady))
    middle = weighted(residuals, 0.6)
    reach = torch.maximum(0.5 * change, 0.1 * size)
    forecast = middle + (forecast - middle).clamp(-reach, reach)
    share = 0.7 * damping + 0.3
    return share * forecast + (1 - share) * middle


class TCPade:
    """
    Args:
        interval: every so many steps one is computed.
        turn: steps are computed where the last residuals turn by this or more (`turning`).
        start: first step that may be skipped is the next one.
        steps: of the run; the last one is computed.
    """

    depth = 0

    def __init__(self, *, interval: int, turn: float, start: int, steps: int) -> None:
        self.interval, self.turn, self.start, self.steps = interval, turn, start, steps
        self.residuals: list[Tensor] = []
        self.input: Tensor | None = None

    def steady(self) -> bool:
        return len(self.residuals) < 5 or turning(self.residuals) < self.turn

    def reused(self, step: int, hidden_states: Tensor, probed: Tensor) -> Tensor | None:
        inside = self.start < step < self.steps - 1 and step % self.interval
        if not inside or len(self.residuals) < 3 or not self.steady():
            return None
        residual = self.forecast(step) + 0.2 * (hidden_states - self.input)
        output = hidden_states + residual
        self.computed(step, hidden_states, probed, output)  # forecasts enter the history, too
        return output

    def forecast(self, step: int) -> Tensor:
        """By thirds: no slope at first, the rational forecast, and more of the change at last."""
        if step <= 0.3 * self.steps:
            return weighted(self.residuals, 0.9)
        found = pade(self.residuals, self.steady())
        if step <= 0.8 * self.steps:
            return found
        return found + 0.3 * (self.residuals[-1] - self.residuals[-2])

    def computed(self, step: int, hidden_states: Tensor, probed: Tensor, output: Tensor) -> None:
        self.residuals = [*self.residuals, output - hidden_states][-HISTORY:]
        self.input = hidden_states


def _make(options: dict[str, Any], run: Any) -> TCPade:
    return TCPade(**options, steps=run.num_inference_steps)


ENABLE = {"TCPade": enabled_residual(_make)}
