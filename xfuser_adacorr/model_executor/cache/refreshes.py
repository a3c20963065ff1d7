"""Sets of refreshed steps: given, evenly spaced, moved to other noise levels."""

import math
from collections.abc import Collection, Sequence
from typing import Any

RefreshSchedule = int | tuple[int, ...] | tuple[bool, ...]

_FORM = (
    "a whole number N of at least 1 (every N-th step), a list of step indices of at least 0, or a "
    "mask of True and False, one a step"
)


def checked_schedule(schedule: Any) -> RefreshSchedule:
    """Check and normalise: an interval, rising step indices, or a mask.

    Raises `TypeError` or `ValueError` that names what was given and what is accepted.
    """
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        if schedule < 1:
            raise ValueError(f"schedule must be {_FORM}, got {schedule}")
        return schedule
    if isinstance(schedule, (str, bool)) or not isinstance(schedule, Collection):
        raise TypeError(f"schedule must be {_FORM}, got {schedule!r}")
    entries = tuple(schedule)
    masks = [isinstance(entry, bool) for entry in entries]
    if entries and all(masks):
        return entries
    for entry, is_mask in zip(entries, masks, strict=True):
        if is_mask or not isinstance(entry, int):
            raise TypeError(f"schedule must be {_FORM}, got the entry {entry!r}")
        if entry < 0:
            raise ValueError(f"schedule must be {_FORM}, got the step {entry}")
    if len(set(entries)) < len(entries):
        raise ValueError(f"schedule: each step may be listed once, got {list(entries)}")
    return tuple(sorted(entries))


def refreshed_steps(schedule: RefreshSchedule, num_steps: int) -> frozenset[int]:
    """The refreshed ones of ``num_steps`` steps; step 0 always is.

    Every N-th step is counted from the last one, which is therefore refreshed (FORA,
    arXiv 2407.01425). Raises `ValueError` for a mask of another length and for steps beyond the
    run.
    """
    if isinstance(schedule, int):
        return frozenset({0, *range(num_steps - 1, -1, -schedule)})
    if schedule and isinstance(schedule[0], bool):
        if len(schedule) != num_steps:
            raise ValueError(
                f"schedule: the mask has {len(schedule)} entries, the run has {num_steps} steps"
            )
        return frozenset({0, *(step for step, refreshed in enumerate(schedule) if refreshed)})
    if schedule and schedule[-1] >= num_steps:
        raise ValueError(
            f"schedule: step {schedule[-1]} is beyond the run, which has steps 0 to {num_steps - 1}"
        )
    return frozenset({0, *schedule})


def evenly_spaced(axis: Sequence[float], count: int) -> tuple[int, ...]:
    """``count`` of the steps, as evenly spaced on ``axis`` as they can be, both ends among them.

    ``axis`` (rising or falling) has one value a step, at least ``count`` of them. A single step is
    step 0.
    """
    first, last = axis[0], axis[-1]
    wanted = [first + (last - first) * k / max(count - 1, 1) for k in range(count)]
    return nearest_steps(axis, wanted)


def nearest_steps(axis: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """A different step for each value of ``wanted`` (ordered as ``axis`` is), the nearest free."""
    steps: list[int] = []
    for rank, value in enumerate(wanted):
        lowest = steps[-1] + 1 if steps else 0
        highest = len(axis) - len(wanted) + rank
        steps.append(min(range(lowest, highest + 1), key=lambda i: abs(axis[i] - value)))
    return tuple(steps)


def interpolated_steps(
    steps: Sequence[int], own_axis: Sequence[float], axis: Sequence[float]
) -> tuple[int, ...]:
    """Refreshed steps of one run -> those of a run with other steps, at the same noise levels.

    The share of refreshed steps is kept. ``own_axis`` and ``axis`` hold the noise level of every
    step of the two runs; the levels of the refreshed steps, taken as a polyline over their rank,
    are read at as many ranks as the other run has refreshes.
    """
    levels = [own_axis[step] for step in sorted(steps)]
    count = max(1, min(len(axis), math.floor(len(levels) * len(axis) / len(own_axis) + 0.5)))
    wanted = []
    for rank in range(count):
        place = (len(levels) - 1) * rank / max(count - 1, 1)
        below = min(int(place), max(len(levels) - 2, 0))
        above = min(below + 1, len(levels) - 1)
        wanted.append(levels[below] + (levels[above] - levels[below]) * (place - below))
    return nearest_steps(axis, wanted)
