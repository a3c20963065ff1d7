"""EasyCache and LazyCache as ComfyUI has them (`comfy_extras/nodes_easycache.py`).

Both reuse ``output - input`` while the expected change of the output, its rate of change by that of
the input, stays below a threshold in sum. EasyCache takes the model's output, LazyCache the
predicted picture, which is what ComfyUI's samplers are given. ComfyUI looks at every eighth pixel
of a side, which is not done here: the small pipelines' latents have 16.
"""

from torch import Tensor

from benchmark.peers.sampler_step import Walk, enabled_policy


def _size(x: Tensor) -> float:
    return float(x.abs().mean())


class EasyCache:
    """
    Args:
        threshold: of the summed change, ``reuse_threshold``.
        start, end: shares of the run between which steps may be skipped.
    """

    def __init__(self, *, threshold: float, start: float = 0.15, end: float = 0.95) -> None:
        self.threshold, self.start, self.end = threshold, start, end
        self.rate: float | None = None
        self.summed = 0.0
        self.change: float | None = None
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def computes(self, walk: Walk) -> bool:
        self.change = None
        share = walk.index / walk.steps
        if share < self.start or share >= self.end or self.input is None:
            return True
        self.change = _size(self.model_input(walk) - self.input)
        if self.rate is None:
            return True
        self.summed += self.rate * self.change / _size(self.output)
        if self.summed < self.threshold:
            return False
        self.summed = 0.0
        return True

    def computed(self, walk: Walk, seen: Tensor) -> None:
        before, self.output = self.output, self.to_output(walk, seen)
        if before is not None and self.change:
            self.rate = _size(self.output - before) / self.change
        self.input = self.model_input(walk)

    def forecast(self, walk: Walk) -> Tensor:
        return self.from_output(walk, self.model_input(walk) + self.output - self.input)

    def model_input(self, walk: Walk) -> Tensor:
        return walk.latents

    def to_output(self, walk: Walk, seen: Tensor) -> Tensor:
        return seen

    def from_output(self, walk: Walk, output: Tensor) -> Tensor:
        return output


def _sigma(walk: Walk) -> tuple[float, float]:
    """(Scale of ComfyUI's latents, noise level): of predicted noise ``x / a = picture + s/a n``."""
    a, s = walk.levels[walk.index]
    return (1.0, s) if walk.flow else (a, s / a)


class LazyCache(EasyCache):
    def model_input(self, walk: Walk) -> Tensor:
        return walk.latents / _sigma(walk)[0]

    def to_output(self, walk: Walk, seen: Tensor) -> Tensor:
        return self.model_input(walk) - _sigma(walk)[1] * seen

    def from_output(self, walk: Walk, output: Tensor) -> Tensor:
        return (self.model_input(walk) - output) / _sigma(walk)[1]


ENABLE = {
    "EasyCache": enabled_policy(lambda options, run: EasyCache(**options), raw=True),
    "LazyCache": enabled_policy(lambda options, run: LazyCache(**options), raw=True),
}
