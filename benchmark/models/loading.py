"""Reads what a run starts from: pipeline, prompts and method configuration."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES, Request
from benchmark.models.schedulers import own_solver, schedulers_of
from benchmark.settings import Settings
from xfuser_adacorr import CacheConfig, load_family_config

USUAL_PROMPTS = 12
"""So many of a split are taken, or all if it has fewer, where no number is given."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(settings: Settings) -> Any:
    """The pipeline on its device, without progress bars.

    Raises:
        BenchmarkError: no such directory, not a pipeline of the family, corrupt, or out of reach,
            or with a scheduler that the family's rows do not know.
    """
    family = FAMILIES[settings.model_type]
    wanted = family.class_name
    path = Path(settings.model).expanduser()
    if path.is_dir():
        source, local = str(path), True
        _check_class(path, wanted)
    elif _HUB_ID.fullmatch(settings.model) and not settings.model.startswith("."):
        source, local = settings.model, False
    else:
        raise BenchmarkError(
            f"--model: no directory {path}; accepted: a diffusers directory or a hub id OWNER/NAME"
        )
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = family.load_class().from_pretrained(
            source, dtype=getattr(torch, settings.dtype), local_files_only=local
        )
    except Exception as error:
        raise BenchmarkError(_load_failure(source, local, wanted, error)) from error
    if own_solver(pipe.scheduler) != family.solvers[0]:
        raise BenchmarkError(
            f"--model: {source} samples with {type(pipe.scheduler).__name__}; accepted for "
            f"{settings.model_type}: {' or '.join(schedulers_of(family.solvers[0]))}"
        )
    try:
        pipe.to(default_device(settings))
    except (RuntimeError, AssertionError) as error:
        raise BenchmarkError(f"--device {settings.device}: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_class(path: Path, wanted: str) -> None:
    index = path / "model_index.json"
    try:
        found = json.loads(index.read_text()).get("_class_name")
    except FileNotFoundError:
        raise BenchmarkError(
            f"--model: {path} has no model_index.json; accepted: a diffusers {wanted} directory"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"--model: {index} cannot be read: {first_line(error)}") from error
    if found != wanted:
        raise BenchmarkError(f"--model: {path} holds a {found}; accepted: {wanted}")


def _load_failure(source: str, local: bool, wanted: str, error: Exception) -> str:
    if local:
        return f"--model: {source} is not a readable {wanted}: {first_line(error)}"
    return (
        f"--model: cannot load {source!r} from the hub, nor is it in the local cache; "
        f"check the name, the network and the access rights ({type(error).__name__})"
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def default_device(settings: Settings) -> str:
    own = f"cuda:{os.environ['LOCAL_RANK']}" if settings.degrees else "cuda"
    return settings.device or (own if torch.cuda.is_available() else "cpu")


def picture_shape(settings: Settings, pipe: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    own = FAMILIES[settings.model_type].picture_size(pipe)
    return settings.height or own, settings.width or own


def load_prompts(settings: Settings) -> list[dict[str, Any]]:
    """The entries ``{"prompt", "seed"}`` of the chosen split, or ``{"class_label", "seed"}``.

    Raises:
        BenchmarkError: the file is missing or malformed, or has too few prompts.
    """
    text = FAMILIES[settings.model_type].text
    try:
        content = json.loads(Path(settings.prompts).read_text())
        entries = [
            {text: str(entry[text]), "seed": int(entry["seed"])}
            for entry in content[settings.split]
        ]
    except FileNotFoundError:
        raise BenchmarkError(f"--prompts: no file {settings.prompts}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(
            f"--prompts: {settings.prompts} must map {settings.split!r} to a list of "
            f'{{"{text}": text, "seed": number}} ({type(error).__name__}: {first_line(error)})'
        ) from error
    wanted = settings.num_prompts or min(USUAL_PROMPTS, len(entries))
    if not entries or wanted > len(entries):
        raise BenchmarkError(
            f"--num_prompts {wanted}: the {settings.split} split has {len(entries)} prompts"
        )
    return entries[:wanted]


def call_arguments(settings: Settings, pipe: Any, text: str | list[str]) -> dict[str, Any]:
    """Of the pipeline's call for a text or a batch of them; `ValueError` for a bad one."""
    height, width = picture_shape(settings, pipe)
    asked = Request(
        text=text,
        height=height,
        width=width,
        num_frames=settings.num_frames,
        guidance_scale=settings.guidance_scale,
        true_cfg_scale=settings.true_cfg_scale,
    )
    return FAMILIES[settings.model_type].call(pipe, asked)


def entry_text(entry: Mapping[str, Any]) -> str:
    """The prompt or class name of an entry."""
    (text,) = (value for name, value in entry.items() if name != "seed")
    return text


def check_texts(settings: Settings, pipe: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """`BenchmarkError` for a text that the pipeline cannot be called with."""
    for entry in entries:
        try:
            call_arguments(settings, pipe, entry_text(entry))
        except ValueError as error:
            raise BenchmarkError(f"--prompts: {settings.prompts}: {error}") from error


def load_documented(settings: Settings) -> dict[str, CacheConfig]:
    """Each method's options as the configuration file documents them.

    Raises:
        BenchmarkError: the file cannot be read, or is another family's.
    """
    try:
        documented = load_family_config(settings.config)
    except (OSError, TypeError, ValueError) as error:
        raise BenchmarkError(f"--config: {' '.join(str(error).split())}") from error
    family = yaml.safe_load(Path(settings.config).read_text()).get("family", settings.model_type)
    if family != settings.model_type:
        raise BenchmarkError(
            f"--config: {settings.config} is for the family {family!r}, but --model_type is "
            f"{settings.model_type!r}; accepted: a file of that family, as "
            f"configs/{settings.model_type}.yaml"
        )
    return documented


def fingerprint(*directories: Path) -> str:
    """A hash of all files below the directories, to tell a retrained or edited model apart."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            digest.update(str(path.relative_to(directory)).encode())
            size = path.stat().st_size
            digest.update(path.read_bytes() if size < 2**26 else str(size).encode())
    return digest.hexdigest()[:16]
