"""Reads Open-Sora 1.2's published transformer: ``config.json`` and safetensors files."""

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .blocks import rotary_frequencies
from .transformer import STDiT3Transformer3DModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MODEL_TYPE = "STDiT3"
IGNORED_OPTIONS = frozenset(
    {
        # training
        "class_dropout_prob",
        "drop_path",
        "freeze_y_embedder",
        "only_train_temporal",
        # choice of kernels and parallelism
        "enable_flash_attn",
        "enable_flashattn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        # unused by the published code
        "input_size",
        # bookkeeping of transformers
        "architectures",
        "auto_map",
        "dtype",
        "model_type",
        "torch_dtype",
        "transformers_version",
    }
)
"""Options of the published configuration that do not change the computation."""
FREQUENCY_TOLERANCE = 1e-2
"""Relative; admits frequencies rounded to bfloat16."""


def load_open_sora_checkpoint(
    path: str | Path, *, torch_dtype: torch.dtype | None = None, **overrides: Any
) -> STDiT3Transformer3DModel:
    """Load STDiT3 from the layout in which Open-Sora 1.2 is published.

    Args:
        path: Directory with ``config.json`` and ``model.safetensors`` (or shards and their
            ``model.safetensors.index.json``), or the model's folder in a hub cache
            (``models--owner--name``).
        torch_dtype: Dtype of the returned model; None: as stored.
        **overrides: Options of `STDiT3Transformer3DModel` that replace those of the file.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If the directory or one of its files is missing.
        ValueError: If an option or a weight is unknown, missing or of another shape; all are named.
    """
    folder = find_snapshot(Path(path))
    config = model_options(read_json(folder / CONFIG_FILE), overrides)
    with torch.device("meta"):
        model = STDiT3Transformer3DModel(**config)
    weights = read_weights(folder)
    check_weights(model.state_dict(), weights)
    check_frequencies(weights["rope.freqs"])
    model.load_state_dict(weights, assign=True)
    return model.to(dtype=torch_dtype).eval()


def find_snapshot(path: Path) -> Path:
    """Return ``path``, or the snapshot of its main revision if it is a folder of a hub cache."""
    if not path.is_dir():
        raise FileNotFoundError(f"path must be a directory, got {str(path)!r}")
    if not (path / "snapshots").is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        folder = path / "snapshots" / main.read_text(encoding="utf-8").strip()
        if not folder.is_dir():
            raise FileNotFoundError(f"{main} names a snapshot that is not there: {folder}")
        return folder
    folders = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    if len(folders) != 1:
        raise FileNotFoundError(
            f"{path} has no refs/main and {len(folders)} snapshots; give the path of one"
        )
    return folders[0]


def model_options(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the model from a published configuration."""
    accepted = set(inspect.signature(STDiT3Transformer3DModel.__init__).parameters) - {"self"}
    reject_unknown("overrides", overrides, accepted)
    if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {config['model_type']!r}")
    if config.get("skip_y_embedder", False):
        raise ValueError("skip_y_embedder must be False: text is projected by the model")
    options = {
        key: value
        for key, value in config.items()
        if key not in IGNORED_OPTIONS | {"skip_y_embedder"} and not key.startswith("_")
    }
    reject_unknown(CONFIG_FILE, options, accepted)
    return options | dict(overrides)


def reject_unknown(where: str, options: Iterable[str], accepted: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(
            f"unknown options in {where}: {', '.join(unknown)}; "
            f"accepted: {', '.join(sorted(accepted))}"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read ``model.safetensors``, or the shards that its index lists."""
    if (folder / WEIGHTS_FILE).is_file():
        return load_file(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not weight_map:
        raise ValueError(f"{INDEX_FILE} must have a weight_map")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)}")
    return {key: value for name in shards for key, value in load_file(folder / name).items()}


def check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` that names every weight that does not fit the model."""
    shared = expected.keys() & weights.keys()
    problems = {
        "unknown": weights.keys() - expected.keys(),
        "missing": expected.keys() - weights.keys(),
        "of another shape": {k for k in shared if expected[k].shape != weights[k].shape},
    }
    found = [f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"weights do not fit the configuration; {'; '.join(found)}")


def check_frequencies(frequencies: Tensor) -> None:
    """Raise `ValueError` if rotary frequencies are not the constant ones of the architecture."""
    constant = rotary_frequencies(2 * len(frequencies))
    if not torch.allclose(frequencies.float(), constant, rtol=FREQUENCY_TOLERANCE, atol=0.0):
        raise ValueError("rope.freqs must be 10000^(-2k/D): others are not supported")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    return json.loads(path.read_text(encoding="utf-8"))
