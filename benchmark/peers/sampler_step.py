"""What peers that act on the guided output share: denoisers are skipped between sampler steps.

Such a peer is a `Policy`. It sees flow matching's coordinates, whatever the model predicts: of
latents ``x = a picture + s noise`` the time ``t = s / (a + s)`` and ``y = x / (a + s)``, for which
the velocity ``noise - picture`` is ``dy/dt``. With ``raw`` it sees the model's own outputs instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmark.peers.restoring import before_every_picture
from benchmark.run.flops import denoisers

REVERSED = ("RectifiedFlowScheduler",)
"""Samplers whose model predicts ``picture - noise``."""


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """(a, s) of every step that ``set_timesteps`` made, and of the end."""
    if predicts_velocity(scheduler):
        sigmas = [*scheduler.sigmas.tolist(), 0.0][: len(scheduler.timesteps) + 1]
        return [(1 - sigma, sigma) for sigma in sigmas]
    if hasattr(scheduler, "sigmas"):
        return [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in scheduler.sigmas.tolist()]
    kept = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    return [(math.sqrt(a), math.sqrt(1 - a)) for a in (*kept, float(scheduler.final_alpha_cumprod))]


def predicts_velocity(scheduler: Any) -> bool:
    """Whether the model predicts flow matching's velocity, and not the noise."""
    flow = getattr(scheduler.config, "use_flow_sigmas", False)
    return flow or not hasattr(scheduler, "alphas_cumprod")


@dataclass(kw_only=True, slots=True)
class Walk:
    """A picture in the making, before its step ``index``."""

    levels: list[tuple[float, float]]
    """`noise_levels`."""
    flow: bool
    """`predicts_velocity`."""
    sign: float = 1.0
    raw: bool = False
    """Whether the policy sees outputs as the model gives them."""
    index: int = 0
    latents: Tensor | None = None
    """As the sampler has them, float32; None before the first step is taken."""
    computed: list[int] = field(default_factory=list)
    """Indices of the computed steps so far, this one included."""

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def times(self) -> list[float]:
        """t of all steps, and of the end."""
        return [s / (a + s) for a, s in self.levels]

    @property
    def y(self) -> Tensor:
        """The latents in flow coordinates."""
        return self.latents / sum(self.levels[self.index])

    def seen(self, output: Tensor) -> Tensor:
        """What the policy is shown of an output of this step."""
        if self.flow or self.raw:
            return self.sign * output
        a, s = self.levels[self.index]
        return ((a + s) * output - self.latents) / a

    def output(self, seen: Tensor) -> Tensor:
        """The inverse of `seen`."""
        if self.flow or self.raw:
            return self.sign * seen
        a, s = self.levels[self.index]
        return (a * seen + self.latents) / (a + s)


class Policy(Protocol):
    """Which steps are computed, and what stands in for the output at the others."""

    def computes(self, walk: Walk) -> bool:
        """Whether the step is to be computed; the first one always is."""

    def computed(self, walk: Walk, seen: Tensor) -> None:
        """A step was computed."""

    def forecast(self, walk: Walk) -> Tensor:
        """What `Walk.seen` would give at a step that is skipped."""


class Sampler(Protocol):
    """A policy that also takes the steps: `forecast` is not asked for."""

    def computes(self, walk: Walk) -> bool: ...

    def computed(self, walk: Walk, seen: Tensor) -> None: ...

    def next_y(self, walk: Walk) -> Tensor:
        """The latents of the next step in flow coordinates."""


class Steps:
    """Runs a policy in a pipeline. A new policy is made for every picture.

    Args:
        make: makes the policy.
        raw: `Walk.raw`.
        at_end: called with the walk after the last step.
    """

    def __init__(
        self,
        pipe: Any,
        make: Callable[[], Any],
        raw: bool = False,
        at_end: Callable[[Walk], None] = lambda walk: None,
    ) -> None:
        self.scheduler, self.make, self.raw, self.at_end = pipe.scheduler, make, raw, at_end
        self._step = pipe.scheduler.step
        pipe.scheduler.step = self._stepping()
        for module in denoisers(pipe):
            module.forward = self._skipping(module.forward)
        before_every_picture(pipe, self._begin)
        self._begin()

    def _begin(self) -> None:
        self.policy, self.walk, self.given = None, None, []
        self._enter()

    def _enter(self) -> None:
        self.computing, self.calls = None, 0

    def _start(self) -> None:
        reverse = type(self.scheduler).__name__ in REVERSED
        self.policy = self.make()
        self.walk = Walk(
            levels=noise_levels(self.scheduler),
            flow=predicts_velocity(self.scheduler),
            sign=-1.0 if reverse else 1.0,
            raw=self.raw,
        )

    def _skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.walk is None:
                self._start()
            if self.computing is None:
                self.computing = self.walk.index == 0 or self.policy.computes(self.walk)
                if self.computing:
                    self.walk.computed.append(self.walk.index)
                    self.given.clear()
            if self.computing:
                self.given.append(forward(*args, **kwargs))
            self.calls += 1
            return self.given[self.calls - 1]

        return call

    def _stepping(self) -> Callable[..., Any]:
        @wraps(self._step)  # pipelines look at its signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kw: Any) -> Any:
            walk, policy = self.walk, self.policy
            walk.latents = sample.float()
            if self.computing:
                policy.computed(walk, walk.seen(model_output.float()))
            elif hasattr(policy, "forecast"):
                model_output = walk.output(policy.forecast(walk)).to(model_output.dtype)
            if hasattr(policy, "next_y"):
                result = self._result(policy.next_y(walk), sample, kw)
            else:
                result = self._step(model_output, timestep, sample, *args, **kw)
            walk.latents = result[0].float()
            walk.index += 1
            self._enter()
            if walk.index == walk.steps:
                self.at_end(walk)
            return result

        return step

    def _result(self, y: Tensor, sample: Tensor, options: dict[str, Any]) -> Any:
        latents = (sum(self.walk.levels[self.walk.index + 1]) * y).to(sample.dtype)
        if options.get("return_dict", True):
            return _Stepped(prev_sample=latents)
        return (latents,)


class _Stepped(SimpleNamespace):
    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


def enabled_policy(
    make: Callable[[dict[str, Any], Any], Any], raw: bool
) -> Callable[..., Callable[[], None]]:
    """(pipeline, options, run) -> what ends it, for a policy ``make(options, run)``."""

    def enable(pipe: Any, options: dict[str, Any], run: Any) -> Callable[[], None]:
        Steps(pipe, lambda: make(options, run), raw=raw)
        return lambda: None  # the scheduler and the denoisers are restored

    return enable


def combined(weights: Any, tensors: list[Tensor]) -> Tensor:
    """sum of w_j tensors_j; weights of 0 are left out."""
    return torch.stack(
        [float(w) * x for w, x in zip(weights, tensors, strict=True) if w] or [0 * tensors[0]]
    ).sum(0)
