"""Uncached trajectories: noted while a pipeline runs, in memory or in files."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.adacorrection import NoRepair
from xfuser_adacorr.model_executor.cache.adacorrection.straight_line import latents_of
from xfuser_adacorr.model_executor.cache.flow_coordinates import FlowPoint
from xfuser_adacorr.model_executor.cache.methods.learned import cannot_follow
from xfuser_adacorr.model_executor.cache.step import Step


class Trajectories:
    """The uncached latents in flow coordinates, for every step and the end: ``[N + 1, R, D]`` a
    call, float32 in memory, or beyond ``memory_limit`` bytes in files of a temporary folder."""

    def __init__(self, num_steps: int, memory_limit: float = math.inf) -> None:
        self.num_steps, self.memory_limit = num_steps, memory_limit
        self._bytes = 0
        self._parts: dict[int, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def note(self, index: int, place: int, y: Tensor) -> None:
        """Keep y ``[R, ...]`` of call ``index`` at step ``place``."""
        if index not in self._parts:
            self._parts[index] = self._room((self.num_steps + 1, len(y), y[0].numel()), index)
        self._parts[index][place] = y.flatten(1).cpu()

    def _room(self, shape: tuple[int, ...], index: int) -> Tensor:
        count = math.prod(shape)
        self._bytes += 4 * count
        if self._bytes <= self.memory_limit:
            return torch.empty(shape)
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="learned-")
        free = shutil.disk_usage(self._folder.name).free
        if free < 4 * count:  # a file that is mapped and finds no room ends the process
            raise OSError(
                f"memory_limit_gib: the uncached runs beyond it need {4 * count / 2**30:.3g} GiB "
                f"more in {self._folder.name}, where {free / 2**30:.3g} GiB are free"
            )
        path = str(Path(self._folder.name) / f"{index}.bin")
        return torch.from_file(path, shared=True, size=count).view(shape)

    def at(self, place: int) -> Tensor:
        """y of all calls at a step, ``[K, D]``."""
        return torch.cat([self._parts[index][place] for index in sorted(self._parts)])

    def gram(self) -> Tensor:
        """Inner products of each sample's moves from step to step, ``[K, N, N]`` float64."""
        found = []
        for index in sorted(self._parts):
            for sample in self._parts[index].unbind(dim=1):
                moves = sample.diff(dim=0).double()
                found.append(moves @ moves.T)
        return torch.stack(found)

    def shape(self, index: int) -> tuple[int, ...]:
        """``(N + 1, R, D)`` of a call's part."""
        return tuple(self._parts[index].shape)

    def check(self, first: int = 0) -> None:
        """`ValueError` for latents that are not finite; ``first`` is the first call's number."""
        for index in sorted(self._parts):
            bad = ~self._parts[index].isfinite().all(dim=2).all(dim=0)
            if bad.any():
                raise ValueError(
                    f"prompts: the uncached latents of call {first + index}, sample "
                    f"{int(bad.nonzero()[0])}, are not finite"
                )


class Recorder(NoRepair):
    """Notes the latents of every step of a call."""

    def __init__(self, trajectories: Trajectories, index: int, points: Sequence[FlowPoint]) -> None:
        self.trajectories, self.index, self.points = trajectories, index, points

    def refresh(self, original, arguments, step: Step, fresh, forecast) -> Any:
        unfit = cannot_follow(step, arguments) if step.index == 0 else None
        if unfit is not None:
            raise ValueError(f"calibration: {unfit}")
        self._note(step.index, arguments["sample"])
        result = original(**arguments)
        if step.is_last:
            self._note(step.index + 1, latents_of(result))
        return result

    def _note(self, place: int, latents: Tensor) -> None:
        self.trajectories.note(self.index, place, self.points[place].to_flow(latents))
