"""FastCache's linear maps: recorded in full runs, fitted, stored beside a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.methods.base import BlockCall, Signal, Streams

from .files import calibration_path, fits_model, model_fingerprint, output_path, written_whole
from .recording import Recorder, recorded
from .runs import Prompts, full_runs

FAST_FILE = "fastcache.safetensors"
RELATIVE_RIDGE = 1e-3


def calibrate_fast(
    pipe: Any,
    prompts: Prompts,
    *,
    output: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fit FastCache's maps on full runs and store them; ``options`` as in `full_runs`."""
    runs = full_runs(pipe, prompts, **options)
    path, recorder = output_path(runs.model, FAST_FILE, output), FastRecorder()
    with recorded(recorder, pipe, runs.model, denoisers=(runs.denoiser,)):
        runs.sample(progress)
    save_fast_maps(path, recorder.maps(), runs.model, runs.settings)
    return path


class LinearMapFit:
    """Ridge regression of ``y - x`` on ``(x, 1)`` from accumulated normal equations (float64)."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens ``[B, N, D]`` before and after a unit."""
        rows = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64)
        target = y.detach().reshape(rows.shape).to("cpu", torch.float64) - rows
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        self.gram += rows.T @ rows
        self.cross += rows.T @ target

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return ``weight [D, D]`` and ``bias [D]`` of ``y = x + weight x + bias``."""
        size = len(self.gram)
        ridge = RELATIVE_RIDGE * self.gram.trace() / size * torch.eye(size, dtype=torch.float64)
        ridge[-1, -1] = 0.0
        solution = torch.linalg.solve(self.gram + ridge, self.cross)
        return solution[:-1].T.float(), solution[-1].float()


class FastRecorder(Recorder):
    """Adds up the normal equations of every block's streams, and of the whole stack's."""

    def __init__(self) -> None:
        self.fits: dict[str, LinearMapFit] = {}
        self._stack_input: Tensor | None = None

    def new_state(self) -> None:
        return None

    def measure(self, state: None, call: BlockCall) -> Signal:
        self._stack_input = call.streams[self.family.output_stream]
        return Signal()

    def note(self, state: None, call: BlockCall, out: Streams) -> None:
        for name, x in call.streams.items():
            self._add(f"blocks.{call.index}.{name}", x, out[name])
        if call.is_last:
            stream = self.family.output_stream
            self._add(f"stack.{stream}", self._stack_input, out[stream])
            self._stack_input = None

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        self.fits.setdefault(name, LinearMapFit(x.shape[-1])).add(x, y)

    def maps(self) -> dict[str, Tensor]:
        """The fitted maps by the names that `load_fast_maps` knows, in float16."""
        result = {}
        for name, fit in self.fits.items():
            weight, bias = fit.solve()
            result[f"{name}.weight"], result[f"{name}.bias"] = weight.half(), bias.half()
        return result


def save_fast_maps(
    path: Path, maps: Mapping[str, Tensor], transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write FastCache's linear maps (``<unit>.<stream>.weight|bias``) with the fingerprint."""
    metadata = {
        "method": "Fast",
        "fingerprint": model_fingerprint(transformer),
        "settings": json.dumps(dict(settings)),
    }
    with written_whole(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in maps.items()}, partial, metadata)


def load_fast_maps(transformer: nn.Module, given: str | None) -> dict[str, Tensor]:
    """Read FastCache's maps; empty where there are none of this model (`fits_model`)."""
    path = calibration_path(transformer, FAST_FILE, given)
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            maps = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"calibration: {path} is not a FastCache calibration ({error})") from error
    return maps if fits_model(path, metadata, "Fast", transformer, given) else {}
