"""Calibration files of Tea, Fast and Ada: stored beside a model, bound to it by a fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
    TeaPolynomial,
    config_of,
)
from xfuser_adacorr.model_executor.cache.methods.codebook import Codebook

TEA_FILE = "teacache.json"
FAST_FILE = "fastcache.safetensors"
ADA_FILE = "adacache.json"
_SAMPLED_VALUES = 256


def model_fingerprint(transformer: nn.Module) -> str:
    """Hash of the architecture and a sample of weights, equal in every dtype."""
    digest = hashlib.sha256()
    matrices = [name for name, parameter in transformer.named_parameters() if parameter.ndim > 1]
    sampled = [name for name in ("proj_out.weight", "x_embedder.weight") if name in matrices]
    for name, parameter in sorted(transformer.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    for name in sampled or [matrices[0], matrices[-1]]:
        values = transformer.get_parameter(name).detach().flatten()[:_SAMPLED_VALUES]
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


def _check(path: Path, metadata: Mapping[str, Any], method: str, transformer: nn.Module) -> None:
    if metadata.get("method") != method:
        raise ValueError(f"calibration: {path} is not a calibration of {method}")
    if metadata.get("fingerprint") != model_fingerprint(transformer):
        raise ValueError(
            f"calibration: {path} was made for another model; calibrate this one or remove the file"
        )


def save_tea_polynomial(
    path: Path, polynomial: TeaPolynomial, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write TeaCache's polynomial with the model's fingerprint and how it was fitted."""
    content = {
        "method": "Tea",
        "fingerprint": model_fingerprint(transformer),
        "coefficients": polynomial.coefficients,
        "domain": polynomial.domain,
        "settings": dict(settings),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_tea_polynomial(transformer: nn.Module, given: str | None) -> TeaPolynomial | None:
    """Read TeaCache's polynomial; None without a file, `ValueError` if it is another model's."""
    path = calibration_path(transformer, TEA_FILE, given)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        polynomial = TeaPolynomial(
            coefficients=tuple(float(c) for c in content["coefficients"]),
            domain=tuple(float(x) for x in content["domain"]),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"calibration: {path} is not a TeaCache calibration ({error})") from error
    _check(path, content, "Tea", transformer)
    return polynomial


def save_fast_maps(
    path: Path, maps: Mapping[str, Tensor], transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write FastCache's linear maps (``<unit>.<stream>.weight|bias``) with the fingerprint."""
    metadata = {
        "method": "Fast",
        "fingerprint": model_fingerprint(transformer),
        "settings": json.dumps(dict(settings)),
    }
    save_file({name: tensor.contiguous() for name, tensor in maps.items()}, path, metadata)


def load_fast_maps(transformer: nn.Module, given: str | None) -> dict[str, Tensor]:
    """Read FastCache's maps; empty without a file, `ValueError` if they are another model's."""
    path = calibration_path(transformer, FAST_FILE, given)
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            maps = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"calibration: {path} is not a FastCache calibration ({error})") from error
    _check(path, metadata, "Fast", transformer)
    return maps


def save_ada_codebook(
    path: Path, codebook: Codebook, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write AdaCache's codebook with the model's fingerprint and how it was fitted."""
    content = {
        "method": "Ada",
        "fingerprint": model_fingerprint(transformer),
        "codebook": codebook.entries,
        "settings": dict(settings),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_ada_codebook(transformer: nn.Module, given: str | None) -> Codebook | None:
    """Read AdaCache's codebook; None without a file, `ValueError` if it is another model's."""
    path = calibration_path(transformer, ADA_FILE, given)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        codebook = Codebook.of(content["codebook"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"calibration: {path} is not an AdaCache calibration ({error})") from error
    _check(path, content, "Ada", transformer)
    return codebook
