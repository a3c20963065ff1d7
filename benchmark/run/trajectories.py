"""Uncached runs of the development prompts and what they tell: what peers are calibrated on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.models.families import FAMILIES
from benchmark.peers.restoring import restored
from benchmark.peers.sampler_step import Steps, Walk, predicts_velocity
from benchmark.run.generate import make_picture, prepared
from benchmark.run.rows import uncached_row
from benchmark.run.store import read_json, write_json
from benchmark.settings import Settings


class _Finished(Exception):
    """The last step is taken: the picture itself is not needed."""


class _Recorded:
    """Computes every step and keeps what it saw."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []
        self.seen: list[Tensor] = []

    def computes(self, walk: Walk) -> bool:
        return True

    def computed(self, walk: Walk, seen: Tensor) -> None:
        self.latents.append(walk.y)
        self.seen.append(seen)

    def forecast(self, walk: Walk) -> Tensor:
        raise AssertionError("every step is computed")


class Samples:
    """
    Args:
        pipe: the pipeline, as it is uncached.
        settings: of the run.
        entries: development prompts.
        path: name -> file in which it is kept.
    """

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        entries: Sequence[dict[str, Any]],
        path: Callable[[str], Path],
    ) -> None:
        self.pipe, self.settings, self.entries, self._path = pipe, settings, entries, path
        self._ends: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[tuple[int, bool], dict[str, Any]] = {}

    def walked(
        self, make: Callable[[], Any], steps: int, prompt: int, raw: bool = False
    ) -> tuple[Any, Walk]:
        """A policy's run of a prompt, without decoding: the policy and the walk at its end."""
        ended: list[Walk] = []

        def finish(walk: Walk) -> None:
            ended.append(walk)
            raise _Finished

        row = uncached_row(steps, FAMILIES[self.settings.model_type].solvers[0])
        with prepared(self.pipe, row), restored(self.pipe):
            run = Steps(self.pipe, make, raw, finish)
            try:
                make_picture(self.pipe, self.settings, self.entries[prompt], steps)
            except _Finished:
                pass
            return run.policy, ended[0]

    def _trajectories(self, steps: int, raw: bool) -> dict[str, Any]:
        raw = raw and not self.flow  # there both are the same
        if (steps, raw) not in self._kept:
            path = self._path(f"trajectories{'-raw' if raw else ''}-{steps}")
            if not path.is_file():
                write_json(path, self._measured(steps, raw))
            self._kept[steps, raw] = read_json(path)
        return self._kept[steps, raw]

    def _measured(self, steps: int, raw: bool) -> dict[str, Any]:
        gram, times = 0.0, []
        for prompt in range(len(self.entries)):
            policy, walk = self.walked(_Recorded, steps, prompt, raw)
            self._ends[steps, prompt] = walk.y
            vectors = torch.stack([*policy.latents, walk.y, *policy.seen]).flatten(1).double()
            gram = gram + vectors @ vectors.T / vectors.shape[1] / len(self.entries)
            times = walk.times
        return {"gram": gram.tolist(), "times": times}

    def gram(self, steps: int, raw: bool) -> np.ndarray:
        """[2 T + 1, 2 T + 1]: mean products of the elements of latents y_0 to y_T and outputs.

        Args:
            raw: whether the outputs are the model's own, and not velocities.
        """
        return np.array(self._trajectories(steps, raw)["gram"])

    @property
    def flow(self) -> bool:
        """Whether the model predicts velocities, and not noise."""
        return predicts_velocity(self.pipe.scheduler)

    def times(self, steps: int) -> list[float]:
        """t of all steps and of the end."""
        return self._trajectories(steps, False)["times"]

    def end_error(
        self, make: Callable[[], Any], steps: int, prompt: int, raw: bool = False
    ) -> float:
        """Mean square of a policy's final latents less the uncached ones."""
        if (steps, prompt) not in self._ends:
            self._ends[steps, prompt] = self.walked(_Recorded, steps, prompt)[1].y
        end = self.walked(make, steps, prompt, raw)[1].y
        return float((end - self._ends[steps, prompt]).square().mean())

    def remembered(
        self, name: str, score: Callable[[tuple[int, ...]], float]
    ) -> Callable[[tuple[int, ...]], float]:
        """``score`` of masks, each asked for once: a search that was interrupted is quick again."""
        path = self._path(f"scores-{name}")
        known = {tuple(mask): value for mask, value in read_json(path)} if path.is_file() else {}

        def ask(mask: tuple[int, ...]) -> float:
            if mask not in known:
                known[mask] = score(mask)
                write_json(path, [[list(mask), value] for mask, value in known.items()])
            return known[mask]

        return ask
