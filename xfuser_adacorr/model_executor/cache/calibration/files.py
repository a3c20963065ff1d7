"""Calibration files: where they stand beside a model, and the fingerprint that binds them to it."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import config_of
from xfuser_adacorr.model_executor.cache.messages import warn_once

_SAMPLED_VALUES = 256


def model_fingerprint(transformer: nn.Module) -> str:
    """Hash of the architecture and a sample of weights, equal in every dtype, and for the same
    model inside of xfuser's wrappers (whose ``module`` it is)."""
    digest = hashlib.sha256()
    parameters = {
        ".".join(part for part in name.split(".") if part != "module"): parameter
        for name, parameter in transformer.named_parameters()
    }
    matrices = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    sampled = [name for name in ("proj_out.weight", "x_embedder.weight") if name in matrices]
    for name in sorted(parameters):
        digest.update(f"{name}{tuple(parameters[name].shape)}".encode())
    for name in sampled or [*matrices[:1], *matrices[-1:]]:  # quantised models may have none
        values = parameters[name].detach().flatten()[:_SAMPLED_VALUES]
        sample = values.to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def calibration_path(transformer: nn.Module, file_name: str, given: str | None) -> Path | None:
    """The given file (which must exist), or the one beside the model's weights, or None."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"calibration: no file {given}")
        return Path(given)
    directory = config_of(transformer).get("_name_or_path")
    path = Path(directory) / file_name if directory else None
    return path if path is not None and path.is_file() else None


def output_path(transformer: nn.Module, file_name: str, output: str | Path | None) -> Path:
    """Where a calibration goes: a file, a directory to put it in, or None, beside the weights.

    Raises `FileNotFoundError` for a directory that is not there, and `ValueError` where the model
    was not loaded from one.
    """
    if output is None:
        directory = config_of(transformer).get("_name_or_path") or ""
        if not (directory and Path(directory).is_dir()):
            raise ValueError(
                f"output must be given: {type(transformer).__name__} was not loaded from a "
                f"directory (its name is {str(directory)!r}), so there is no place beside its "
                "weights"
            )
        return Path(directory) / file_name
    path = Path(output)
    if path.is_dir():
        return path / file_name
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: there is no directory {path.parent}")
    return path


def fits_model(
    path: Path,
    metadata: Mapping[str, Any],
    method: str,
    transformer: nn.Module,
    given: str | None,
) -> bool:
    """Whether a calibration is this model's; one that merely lies beside it is left aside, once
    said: a LoRA, fused projections or quantised weights make it another model's.

    Raises `ValueError` for another method's file, and for another model's that was ``given``.
    """
    if metadata.get("method") != method:
        raise ValueError(f"calibration: {path} is not a calibration of {method}")
    if metadata.get("fingerprint") == model_fingerprint(transformer):
        return True
    told = f"calibration: {path} was made for another model"
    if given is not None:
        raise ValueError(f"{told}; calibrate this one, or do not give the file")
    warn_once(f"{told}, and is left aside: {method} goes on without it")
    return False


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The path to write instead of ``path``, which it then becomes: nobody ever finds half of it.

    Raises `OSError` that names ``path`` where there is no space, or no right to write.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"output: {path} could not be written: {error}") from error
    finally:
        with suppress(OSError):  # as where nothing could be written at all
            partial.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text as `written_whole` does."""
    with written_whole(path) as partial:
        partial.write_text(text)
