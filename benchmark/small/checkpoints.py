"""Atomic files: a reader sees either the whole old content or the whole new one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmark.run.store import whole_file


def save_atomic(content: Any, path: Path) -> None:
    """`torch.save` by `whole_file`."""
    with whole_file(path) as partial:
        torch.save(content, partial)


def load_state(path: Path) -> Any:
    """What `save_atomic` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a fresh directory that then takes the name `path`.

    The directory that had the name is removed after the exchange.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".fresh")
    old = path.with_name(path.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
