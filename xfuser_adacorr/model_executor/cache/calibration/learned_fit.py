"""The closed-loop fit of learned correction: a schedule's coefficients, by least squares.

In flow coordinates (`flow_coordinates`) a run computes the velocities ``u_k`` at the times ``t_k``
of a schedule's refreshes, and moves from one to the next by

    ``y_{k+1} = y_k + sum_{m <= k} b_km u_m``.

The numbers ``b_k`` are fitted one refresh after the other over K samples at once, such that
``y_{k+1}`` is the uncached run's where it is at that time, with the velocities of the trajectory
that the numbers fitted before have led to. That is why errors made earlier are mended: what is
fitted includes them. (Linear combinations of what is known, fitted: arXiv 2305.14677, 2403.01329.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RIDGE = 1e-4
"""Pull towards the prior, of the mean diagonal of the velocities' Gram matrix."""
ROUNDS = 3
"""Times that the samples are weighed anew."""
LEAST_ERROR = 0.01
"""Added to a sample's squared error before it is inverted, in mean errors: bounds its weight."""


def adams_bashforth(times: Sequence[float], end: float) -> list[float]:
    """Weights of the velocities at ``times`` in ``y(end) - y(times[-1])``.

    The integral of the line through the last two (variable-step Adams-Bashforth of order 2); of a
    single one Euler's.
    """
    weights, step = [0.0] * len(times), end - times[-1]
    weights[-1] = step
    if len(times) > 1 and times[-1] != times[-2]:
        share = step**2 / (2.0 * (times[-1] - times[-2]))
        weights[-1] += share
        weights[-2] -= share
    return weights


def fit_gap(
    gram: Tensor,
    moments: Tensor,
    energy: Tensor,
    ridge: float = RIDGE,
    rounds: int = ROUNDS,
) -> Tensor:
    """``argmin_c sum_i w_i |r_i - sum_m c_m u_im|^2 + ridge * d * |c|^2``, ``[M]`` float64.

    ``gram`` ``[K, M, M]`` holds ``<u_im, u_in>`` of each sample, ``moments`` ``[K, M]``
    ``<u_im, r_i>`` and ``energy`` ``[K]`` ``|r_i|^2``, all float64; d is the mean diagonal of the
    weighted Gram matrix. A sample's weight is 1 over its squared error (plus 1 % of the mean one),
    found in ``rounds`` rounds from equal ones, so that none of them decides alone.
    """
    weights = torch.full_like(energy, 1.0 / len(energy))
    for _ in range(rounds):
        normal = torch.einsum("i,imn->mn", weights, gram)
        size = normal.diagonal().mean()
        pull = ridge * size * torch.eye(len(normal), dtype=normal.dtype)
        if size <= 0.0:  # no velocity: nothing to combine
            return torch.zeros(len(normal), dtype=normal.dtype)
        found = torch.linalg.solve(normal + pull, weights @ moments)
        errors = energy - 2.0 * moments @ found + torch.einsum("m,imn,n->i", found, gram, found)
        errors = errors.clamp(min=0.0)
        if errors.sum() == 0.0:
            break
        weights = 1.0 / (errors + LEAST_ERROR * errors.mean())
        weights = weights / weights.sum()
    return found


class ScheduleFit:
    """The fit of one schedule, refresh by refresh, on K samples at once.

    ``schedule`` are the steps refreshed, from 0 on; ``times`` those of all steps and of the end.
    ``fitted`` says which samples count (``[K]`` bool; None: all), the others go along. ``samples``
    makes sums of all K samples out of those held here (`Together.samples`).
    """

    def __init__(
        self,
        schedule: Sequence[int],
        times: Sequence[float],
        fitted: Tensor | None = None,
        ridge: float = RIDGE,
        rounds: int = ROUNDS,
        samples: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        self.schedule, self.times = tuple(schedule), tuple(times)
        self.anchors = (*self.schedule[1:], len(times) - 1)
        """The step that each refresh moves to."""
        self.fitted, self.ridge, self.rounds, self.samples = fitted, ridge, rounds, samples
        self.coefficients: list[list[float]] = []
        self.velocities: list[Tensor] = []
        """``[K, D]`` float32 of every refresh so far."""
        self.latents: list[Tensor] = []
        """y at the same refreshes."""
        self._gram: Tensor | None = None

    def begin_as(self, other: "ScheduleFit") -> int:
        """Take over what the schedules have in common; returns at how many refreshes.

        Those refreshes need not be computed again.
        """
        shared = 0
        for mine, theirs in zip(self.schedule, other.schedule, strict=False):
            if mine != theirs or shared == len(other.velocities):
                break
            shared += 1
        self.velocities, self.latents = other.velocities[:shared], other.latents[:shared]
        self.coefficients = other.coefficients[: max(shared - 1, 0)]
        if shared:
            self._gram = other._gram[:, :shared, :shared]
        return shared

    def refresh(self, latents: Tensor, velocities: Tensor) -> None:
        """The next refresh's y and u, ``[K, D]`` each; `ValueError` if one is not finite."""
        self.latents.append(latents)
        self.velocities.append(velocities)
        k = len(self.velocities)
        wrong = [(~each.isfinite()).sum(dim=1).double() for each in (latents, velocities)]
        sums = [*wrong, *(inner(u, velocities) for u in self.velocities)]
        sums = self.samples(torch.stack(sums, dim=1))
        for name, bad in zip(("latents", "velocities"), sums.T, strict=False):
            if bad.any():
                raise ValueError(
                    f"the {name} at step {self.schedule[k - 1]} are not finite for sample "
                    f"{int(bad.nonzero()[0])}: nothing can be fitted to them"
                )
        grown = torch.zeros(len(sums), k, k, dtype=torch.float64)
        if k > 1:
            grown[:, : k - 1, : k - 1] = self._gram
        grown[:, -1, :] = grown[:, :, -1] = sums[:, 2:]
        self._gram = grown

    def fit(self, k: int, target: Tensor) -> list[float]:
        """Coefficients of refresh ``k``, towards the uncached y ``[K, D]`` at its anchor."""
        if k < len(self.coefficients):
            return self.coefficients[k]
        times = [self.times[step] for step in self.schedule[: k + 1]]
        prior = adams_bashforth(times, self.times[self.anchors[k]])
        gram = self._gram[:, : k + 1, : k + 1]
        aim = target - self.latents[k]
        wanted = [inner(u, aim) for u in self.velocities[: k + 1]]
        *wanted, far = self.samples(torch.stack([*wanted, inner(aim, aim)], dim=1)).unbind(dim=1)
        wanted = torch.stack(wanted, dim=1)
        # What the prior leaves over, in inner products: |aim - P|^2 and <u, aim - P>.
        p = torch.tensor(prior, dtype=torch.float64)
        moments = wanted - gram @ p
        energy = far - 2.0 * wanted @ p + torch.einsum("m,imn,n->i", p, gram, p)
        chosen = slice(None) if self.fitted is None else self.fitted
        sums = gram[chosen], moments[chosen], energy[chosen].clamp(min=0.0)
        found = fit_gap(*sums, self.ridge, self.rounds)
        self.coefficients.append((p + found).tolist())
        return self.coefficients[k]

    def move(self, k: int) -> Tensor:
        """``sum_m b_km u_m``, ``[K, D]``."""
        return combined(self.velocities[: k + 1], self.coefficients[k])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``<a_i, b_i>`` of the rows of two ``[K, D]``, ``[K]`` float64."""
    return torch.einsum("kd,kd->k", a.double(), b.double())


def combined(velocities: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``sum_m b_m u_m``, a tensor of its own."""
    total = velocities[0] * coefficients[0]
    for velocity, coefficient in zip(velocities[1:], coefficients[1:], strict=True):
        total.add_(velocity, alpha=coefficient)
    return total
