"""BAG (arXiv 2608.09231): a gate of six numbers that spends a budget of exactly B steps."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.peers.bud_cache import Reuse, first_mask
from benchmark.peers.paths import SHARES, Mask, annealed_mask, budget
from benchmark.peers.sampler_step import Walk, enabled_policy

HIDDEN = 24
PROMPTS = 3
ITERATIONS = 30
"""Masks that the search of a prompt's own schedule tries, for each budget."""
EPOCHS = 1500


def features(
    *, step: int, steps: int, spent: int, computed: int, last: int, since: float, moved: float
) -> list[float]:
    """What the gate sees before a step.

    Args:
        step, steps: index of this one, and their number T.
        spent, computed: c computed steps of the budget B.
        last: the last computed step.
        since, moved: relative change of the latents since that step, and since the one before.
    """
    return [
        computed / steps,
        (computed - spent) / computed,
        (computed - spent) / (steps - step),
        float(step - last),
        since,
        moved,
    ]


def relative_change(x: Tensor, before: Tensor) -> float:
    return float((x - before).norm() / before.norm())


def build_gate() -> nn.Sequential:
    """Six features -> the logit of "compute"; 193 parameters."""
    return nn.Sequential(nn.Linear(6, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def trained_gate(inputs: Tensor, labels: Tensor, seed: int = 0) -> dict[str, Any]:
    """The gate's weights as lists, with the mean and spread of its inputs.

    Args:
        inputs: `features` [N, 6].
        labels: 1 where the step was computed, [N].
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = build_gate()
    mean, spread = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2, weight_decay=1e-4)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            logits = gate((inputs - mean) / spread)[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = {name: value.tolist() for name, value in gate.state_dict().items()}
    return {"mean": mean.tolist(), "spread": spread.tolist(), "weights": weights}


class BAG(Reuse):
    """
    Args:
        gate: what `trained_gate` gave.
        computed: the budget B.
        mask: computed steps; None: the gate decides. `inputs` keeps what it sees.
    """

    def __init__(self, gate: dict[str, Any] | None, computed: int, mask: Mask | None = None):
        super().__init__(mask or ())
        self.budget, self.mask = computed, mask
        self.inputs: list[list[float]] = []
        self.before: Tensor | None = None
        if gate is not None:
            self.gate = build_gate()
            self.gate.load_state_dict({n: torch.tensor(w) for n, w in gate["weights"].items()})
            self.mean, self.spread = torch.tensor(gate["mean"]), torch.tensor(gate["spread"])

    def computes(self, walk: Walk) -> bool:
        x, spent, left = walk.y, len(walk.computed), walk.steps - walk.index
        seen = features(
            step=walk.index,
            steps=walk.steps,
            spent=spent,
            computed=self.budget,
            last=walk.computed[-1],
            since=relative_change(x, self.at_last),
            moved=relative_change(x, self.before),
        )
        self.before = x
        self.inputs.append(seen)
        if self.mask is not None:
            return walk.index in self.mask
        if self.budget - spent in (0, left):  # exactly B are spent
            return spent < self.budget
        with torch.no_grad():
            logit = self.gate((torch.tensor(seen) - self.mean) / self.spread)
        return float(logit) > 0

    def computed(self, walk: Walk, seen: Tensor) -> None:
        super().computed(walk, seen)
        self.at_last = walk.y
        self.before = self.at_last if self.before is None else self.before


def _make(options: dict[str, Any], run: Any) -> BAG:
    return BAG(run.calibration, budget(options, run.num_inference_steps))


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """One gate for all budgets, from masks searched for each of a few prompts."""
    inputs, labels = [], []
    for share in SHARES:
        computed = math.ceil(share * steps)
        start, forced = first_mask(computed, steps)
        for prompt in range(PROMPTS):
            score = samples.remembered(
                f"bag-{computed}-of-{steps}-{prompt}",
                lambda mask, prompt=prompt: samples.end_error(
                    lambda: Reuse(mask), steps, prompt, raw=True
                ),
            )
            mask = annealed_mask(score, start, steps, ITERATIONS, forced)
            policy = BAG(None, computed, mask)
            samples.end_error(lambda policy=policy: policy, steps, prompt, raw=True)
            inputs += policy.inputs
            labels += [float(step in mask) for step in range(1, steps)]
    return trained_gate(torch.tensor(inputs), torch.tensor(labels))


ENABLE = {"BAG": enabled_policy(_make, raw=True)}
CALIBRATE = {"BAG": (_calibrate, ())}
