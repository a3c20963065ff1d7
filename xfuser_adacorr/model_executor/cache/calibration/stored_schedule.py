"""Searched schedules: stored beside a model, bound to it, its sampler and its noise levels."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from xfuser_adacorr.model_executor.cache.refreshes import interpolated_steps
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .files import calibration_path, model_fingerprint, write_whole

SCHEDULE_FILE = "schedule.json"
ADACORRECTION = "adacorrection"
LEVEL_TOLERANCE = 1e-3
"""Difference of noise levels (in [0, 1]) up to which two runs are taken to have the same ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSchedule:
    """Refreshed steps that a search found, and the run that they were found on."""

    refreshed: tuple[int, ...]
    stand_in: str
    """``reuse``, ``forecast`` or ``adacorrection``."""
    sampler: dict[str, Any]
    """Class and options of the sampler (`describe_sampler`)."""
    levels: tuple[float, ...]
    """Place of every step on the forecast's axis (`Step.coordinate`)."""
    score_db: float
    """PSNR of the final latents against the uncached ones, over the development prompts."""
    path: str = ""

    @property
    def num_steps(self) -> int:
        return len(self.levels)

    def steps_for(self, places: Places | None, *, interpolate: bool) -> tuple:
        """Refreshed steps for the run that begins on ``places``.

        Raises `ValueError` for another sampler, and unless ``interpolate`` for another number of
        steps or other noise levels.
        """
        if places is None:
            raise ValueError(
                f"scheduler must be given for a stored schedule: {self.path} was searched with "
                f"{self.sampler['class']}"
            )
        sampler = places.sampler
        if sampler != self.sampler:
            names = sorted(
                name
                for name in sampler | self.sampler
                if sampler.get(name) != self.sampler.get(name)
            )
            raise ValueError(
                f"schedule: {self.path} was searched for another sampler: "
                + ", ".join(f"{n} {self.sampler.get(n)!r}, not {sampler.get(n)!r}" for n in names)
            )
        levels = places.coordinates
        if interpolate:
            return interpolated_steps(self.refreshed, self.levels, levels)
        if len(levels) != self.num_steps:
            raise ValueError(
                f"schedule: {self.path} was searched for {self.num_steps} steps, this run has "
                f"{len(levels)}; search for it, or set schedule_interpolation=True"
            )
        if max(abs(a - b) for a, b in zip(levels, self.levels, strict=True)) > LEVEL_TOLERANCE:
            raise ValueError(
                f"schedule: {self.path} was searched for other noise levels (another picture size "
                "or shift); search for these, or set schedule_interpolation=True"
            )
        return self.refreshed


def save_schedule(
    path: Path, schedule: StoredSchedule, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write a schedule with the model's fingerprint, its budget, and how it was searched."""
    content = asdict(schedule)
    del content["path"]
    content = {
        "method": "Schedule",
        "fingerprint": model_fingerprint(transformer),
        "num_steps": schedule.num_steps,
        "budget": len(schedule.refreshed),
        **content,
        "settings": dict(settings),
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_schedule(transformer: nn.Module, given: str | None, stand_in: str) -> StoredSchedule:
    """Read a searched schedule, the given one or the one beside the model.

    Raises `FileNotFoundError` where there is none, and `ValueError` for another model's and one
    that was searched for another stand-in.
    """
    path = calibration_path(transformer, SCHEDULE_FILE, given)
    if path is None:
        raise FileNotFoundError(
            f"schedule: none is given, and there is no {SCHEDULE_FILE} beside the model; give "
            "schedule=N or a list of steps, or search for one (scripts/search_schedule.py)"
        )
    try:
        content = json.loads(path.read_text())
        method, fingerprint = content["method"], content["fingerprint"]
        schedule = StoredSchedule(
            refreshed=tuple(int(step) for step in content["refreshed"]),
            stand_in=str(content["stand_in"]),
            sampler=dict(content["sampler"]),
            levels=tuple(float(level) for level in content["levels"]),
            score_db=float(content["score_db"]),
            path=str(path),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"schedule: {path} is not a stored schedule ({error})") from error
    if method != "Schedule":
        raise ValueError(f"schedule: {path} is not a stored schedule, but of {method}")
    if fingerprint != model_fingerprint(transformer):
        raise ValueError(
            f"schedule: {path} was searched for another model; search for this one or remove the "
            "file"
        )
    if schedule.stand_in != stand_in:
        raise ValueError(
            f"schedule: {path} was searched for the stand-in {schedule.stand_in!r}, not "
            f"{stand_in!r}; search for it, or give its steps as schedule={schedule.refreshed}"
        )
    return schedule
