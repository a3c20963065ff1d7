"""The output directory: every file appears whole or not at all, and finished rows stay."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.errors import BenchmarkError

_UNFINISHED = ".unfinished-"
FRAME_MS = 100
"""How long an animated file shows a frame."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it if the block succeeds, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED, suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    with whole_file(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a file; `BenchmarkError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error


class Store:
    """Rows, reference pictures and the settings they belong to, below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def results(self) -> Path:
        return self.directory / "results.json"

    @property
    def report(self) -> Path:
        return self.directory / "report.md"

    @property
    def _identity(self) -> Path:
        return self.directory / "rows" / "settings.json"

    def check(self, resume: bool) -> None:
        """Raise `BenchmarkError` if the directory cannot be used; writes nothing."""
        existing = self.directory
        while not existing.exists() and not existing.is_symlink():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise BenchmarkError(
                f"--output_dir: {self.directory} cannot be written ({existing} is no writable "
                f"directory); accepted: a new or empty directory"
            )
        if resume and not self._identity.is_file():
            raise BenchmarkError(f"--resume: {self.directory} holds no interrupted run")
        if not resume and existing == self.directory and any(existing.iterdir()):
            raise BenchmarkError(
                f"--output_dir: {self.directory} is not empty; choose another directory, "
                f"or --resume to go on with the run in it"
            )

    def open(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Create the directory for a run with this identity, or check that it is this run's.

        Raises:
            BenchmarkError: the interrupted run had other settings, or nothing can be written.
        """
        identity = json.loads(json.dumps(identity))
        if not resume:
            try:
                write_json(self._identity, identity)
            except OSError as error:
                raise BenchmarkError(
                    f"--output_dir: {self.directory} cannot be written: {error.strerror}"
                ) from error
            return
        for remnant in self.directory.rglob(f"{_UNFINISHED}*"):
            remnant.unlink()
        before = read_json(self._identity)
        for name in sorted({*before, *identity}):
            if before.get(name) != identity.get(name):
                raise BenchmarkError(
                    f"--resume: {name} was {before.get(name)!r} in the interrupted run and is "
                    f"{identity.get(name)!r} now; use the same, or another --output_dir"
                )

    def row(self, key: str) -> dict[str, Any] | None:
        path = self.directory / "rows" / f"{key}.json"
        return read_json(path) if path.is_file() else None

    def kept_row(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row as it is kept, made first if it is not there."""
        if self.row(key) is None:
            self.save_row(key, make())
        return self.row(key)

    def save_row(self, key: str, result: Mapping[str, Any]) -> None:
        write_json(self.directory / "rows" / f"{key}.json", result)

    def pictures(self, name: str) -> Tensor | None:
        """Float pictures [N, 3, H, W] or clips [N, F, 3, H, W] kept for comparison, exact."""
        path = self.directory / "references" / f"{name}.safetensors"
        return load_file(path)["pictures"] if path.is_file() else None

    def save_pictures(self, name: str, pictures: Tensor) -> None:
        with whole_file(self.directory / "references" / f"{name}.safetensors") as temporary:
            save_file({"pictures": pictures.contiguous()}, temporary)

    def save_pngs(self, key: str, pictures: Tensor) -> None:
        """A file for each picture [N, 3, H, W], an animated one for each clip [N, F, 3, H, W]."""
        from PIL import Image

        pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()
        for index, picture in enumerate(pixels):
            frames = picture if picture.ndim == 4 else picture[None]
            first, *further = [Image.fromarray(frame) for frame in frames]
            moving = {"save_all": True, "append_images": further, "duration": FRAME_MS, "loop": 0}
            with whole_file(self.directory / "pictures" / key / f"{index:03d}.png") as temporary:
                first.save(temporary, **(moving if further else {}))

    def save_trace(self, key: str, trace: Any) -> str:
        """Write a decision trace and return its path relative to the directory."""
        path = self.directory / "traces" / f"{key}.json"
        with whole_file(path) as temporary:
            trace.save(temporary)
        return str(path.relative_to(self.directory))

    def latencies(self) -> dict[str, list[float]]:
        path = self.directory / "rows" / "latency.json"
        return read_json(path) if path.is_file() else {}

    def save_latencies(self, seconds: Mapping[str, list[float]]) -> None:
        write_json(self.directory / "rows" / "latency.json", seconds)

    def save_figure(self, name: str, draw: Callable[[Path], None]) -> str:
        """Let `draw` write a picture file and return its path relative to the directory."""
        with whole_file(self.directory / name) as temporary:
            draw(temporary)
        return name
