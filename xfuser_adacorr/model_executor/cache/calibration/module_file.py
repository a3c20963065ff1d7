"""Tables of methods on modules, stored beside a model and bound to the runs they were made on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import calibration_path, fits_model, model_fingerprint, written_whole

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.schedulers import Places

LEVEL_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ModuleTable:
    """What was fitted, for each step and module."""

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    """Names of the modules, in the tables' order."""
    sampler: dict[str, Any]
    levels: tuple[float, ...]
    """Place of every step on the forecast's axis."""
    settings: dict[str, Any]
    """How it was made."""
    path: str

    @property
    def num_steps(self) -> int:
        return len(self.levels)

    def check(self, places: "Places | None") -> None:
        """Raise `ValueError` for a run on other steps, or with another sampler."""
        if places is None:
            raise ValueError(f"scheduler must be given: {self.path} is bound to a sampler")
        if places.sampler != self.sampler:
            raise ValueError(
                f"calibration: {self.path} was made with the sampler {self.sampler}, this run has "
                f"{places.sampler}"
            )
        levels = places.coordinates
        if len(levels) != self.num_steps:
            raise ValueError(
                f"calibration: {self.path} was made for {self.num_steps} steps, this run has "
                f"{len(levels)}"
            )
        if max(abs(a - b) for a, b in zip(levels, self.levels, strict=True)) > LEVEL_TOLERANCE:
            raise ValueError(f"calibration: {self.path} was made for other noise levels")

    def check_modules(self, names: Sequence[str]) -> None:
        """Raise `ValueError` for a model with other modules."""
        if tuple(names) != self.modules:
            raise ValueError(
                f"calibration: {self.path} was made for {len(self.modules)} modules of other names "
                f"than the model's {len(names)}"
            )


def save_table(
    path: Path,
    method: str,
    model: nn.Module,
    modules: Sequence[str],
    places: "Places",
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> Path:
    """Write a table of ``method`` for ``model``, as it runs on ``places``."""
    described = {
        "modules": list(modules),
        "sampler": places.sampler,
        "levels": places.coordinates,
        "settings": dict(settings),
    }
    metadata = {
        "method": method,
        "fingerprint": model_fingerprint(model),
        **{name: json.dumps(value) for name, value in described.items()},
    }
    with written_whole(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    return path


def load_table(model: nn.Module, given: str | None, file_name: str, method: str) -> ModuleTable:
    """Read the given file, or the one beside the model.

    Raises `FileNotFoundError` where there is none, `ValueError` for another method's, another
    model's, and what is no such file.
    """
    path = calibration_path(model, file_name, given)
    if path is None:
        raise FileNotFoundError(
            f"calibration: {method} needs {file_name}, and there is none beside the model; make "
            f"one with calibrate(pipe, {method!r}, prompts, ...), or give its path"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"calibration: {path} is not a table of {method} ({error})") from error
    fits_model(path, metadata, method, model, str(path))  # without it the method cannot act
    read = {k: json.loads(metadata[k]) for k in ("modules", "sampler", "levels", "settings")}
    return ModuleTable(
        tensors,
        tuple(read["modules"]),
        read["sampler"],
        tuple(read["levels"]),
        read["settings"],
        str(path),
    )
