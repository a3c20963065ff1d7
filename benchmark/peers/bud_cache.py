"""BudCache (arXiv 2606.13496): a fixed mask of exactly B steps, annealed on the final latents."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from benchmark.peers.l2p import even
from benchmark.peers.paths import Mask, annealed_mask, budget
from benchmark.peers.sampler_step import Walk, enabled_policy

ITERATIONS = 200


class Reuse:
    """The last computed output stands in for the skipped ones."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps
        self.value: Tensor | None = None

    def computes(self, walk: Walk) -> bool:
        return walk.index in self.steps

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.value = seen

    def forecast(self, walk: Walk) -> Tensor:
        return self.value


def first_mask(computed: int, steps: int) -> tuple[Mask, range]:
    """The mask to begin from, and its forced steps: the first ``max(1, B / 4)``."""
    forced = range(max(1, computed // 4))
    rest = computed - len(forced)
    later = [len(forced) + place for place in even(rest, steps - len(forced))] if rest else []
    return (*forced, *later), forced


def _make(options: dict[str, Any], run: Any) -> Reuse:
    return Reuse(run.calibration)


def _calibrate(samples: Any, options: dict[str, Any], steps: int) -> list[int]:
    """On one prompt, as published."""
    start, forced = first_mask(budget(options, steps), steps)
    score = samples.remembered(
        f"budcache-{len(start)}-of-{steps}",
        lambda mask: samples.end_error(lambda: Reuse(mask), steps, 0, raw=True),
    )
    return list(annealed_mask(score, start, steps, ITERATIONS, forced))


ENABLE = {"BudCache": enabled_policy(_make, raw=True)}
CALIBRATE = {"BudCache": (_calibrate, ("share",))}
