"""Search for the best set of refreshed steps: coordinate exchange, one refresh moved at a time."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from xfuser_adacorr.model_executor.cache.refreshes import evenly_spaced

Steps = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Outcome of a search."""

    steps: Steps
    score: float
    evaluations: int
    """Different sets that were scored."""
    complete: bool
    """No move of one refresh improves any start's result; False if evaluations ran out."""


class _Spent(Exception):
    """No evaluation is left."""


def moves(steps: Steps, step: int, num_steps: int) -> Iterator[Steps]:
    """Sets near ``steps`` that differ in where ``step`` is; step 0 stays, it is always computed.

    First ``step`` alone: within its gap, nearest first, then in the middles of the other gaps, the
    longest first. Then by one together with all refreshes after it, or before it, which changes one
    gap and keeps the others.
    """
    rest = [other for other in steps if other != step]
    below = max(other for other in rest if other < step)
    above = min((other for other in rest if other > step), default=num_steps)
    free = [place for place in range(below + 1, above) if place != step]
    places = sorted(free, key=lambda place: (abs(place - step), place))
    gaps = sorted(pairwise([*rest, num_steps]), key=lambda gap: gap[0] - gap[1])
    places += [(a + b) // 2 for a, b in gaps if b - a > 1 and a != below]
    for place in places:
        yield tuple(sorted([*rest, place]))
    before, after = [s for s in steps[1:] if s <= step], [s for s in steps if s >= step]
    for by in (1, -1):
        for group in (before, after):
            shifted = {*steps} - {*group} | {s + by for s in group}
            if len(group) > 1 and len(shifted) == len(steps) and max(shifted) < num_steps:
                yield tuple(sorted(shifted))


def even_starts(log_snrs: Sequence[float], computed: int) -> dict[str, Steps]:
    """Named sets of ``computed`` steps to begin a search from.

    Evenly spaced in the step index and in the log-SNR (one value a step), each with the last step
    and without it: at few refreshes the last one serves better elsewhere.
    """
    axes = {"even": range(len(log_snrs)), "even in log-SNR": log_snrs}
    starts = {name: evenly_spaced(axis, computed) for name, axis in axes.items()}
    if computed < len(log_snrs):
        for name, axis in axes.items():
            starts[f"{name}, last step spared"] = evenly_spaced(axis, computed + 1)[:-1]
    return starts


def search_schedule(
    score: Callable[[Steps], float],
    starts: Sequence[Steps],
    num_steps: int,
    *,
    seed: int = 0,
    max_evaluations: int | None = None,
    known: Mapping[Steps, float] | None = None,
    scored: Callable[[Steps, float], None] = lambda steps, value: None,
    neighbours: Callable[[Steps, int, int], Iterator[Steps]] = moves,
) -> Found:
    """The set of refreshed steps with the highest score that exchanges lead to from the starts.

    All starts are scored first and the best one is climbed from first. Refreshes are taken in
    seeded random order; the first of their `moves` that improves the score is made, until none
    does. The course depends on the scores and the seed alone: with the scores ``known`` from an
    interrupted search (each was handed to ``scored``) the search goes on as if it had not stopped.

    Args:
        score: of a rising tuple of steps that begins with 0; higher is better.
        starts: sets to begin from, of equal size, each once.
        num_steps: steps of the run.
        max_evaluations: different sets to score at the most, known ones included; None: no limit.
        neighbours: (set, one of its steps, steps of the run) -> sets to try in its place.

    Raises `ValueError` for starts that are no sets of steps of the run.
    """
    for start in starts:
        legal = start and start[0] == 0 and start[-1] < num_steps and len(start) == len(starts[0])
        if not legal or list(start) != sorted(set(start)):
            raise ValueError(
                f"starts must be rising, begin at step 0, end before {num_steps} and be equally "
                f"long, got {start}"
            )
    known, asked = dict(known or {}), {}

    def value(steps: Steps) -> float:
        if steps not in asked:
            if max_evaluations is not None and len(asked) >= max_evaluations:
                raise _Spent
            if steps not in known:
                known[steps] = score(steps)
                scored(steps, known[steps])
            asked[steps] = known[steps]
        return asked[steps]

    complete = True
    try:
        generator = random.Random(seed)
        for start in sorted(dict.fromkeys(starts), key=value, reverse=True):
            _climb(start, value, num_steps, generator, neighbours)
    except _Spent:
        complete = False
    best = max(asked, key=lambda steps: asked[steps])
    return Found(best, asked[best], len(asked), complete)


def near_moves(steps: Steps, step: int, num_steps: int, reach: int = 3) -> Iterator[Steps]:
    """Sets with ``step`` moved by up to ``reach`` steps to a free place, nearest first."""
    rest = [other for other in steps if other != step]
    for by in (sign * far for far in range(1, reach + 1) for sign in (1, -1)):
        if 0 < step + by < num_steps and step + by not in rest:
            yield tuple(sorted([*rest, step + by]))


def _climb(
    start: Steps,
    value: Callable[[Steps], float],
    num_steps: int,
    generator: random.Random,
    neighbours: Callable[[Steps, int, int], Iterator[Steps]],
) -> None:
    current, improved = start, True
    while improved:
        improved = False
        for step in generator.sample(current[1:], len(current) - 1):
            if step not in current:  # an earlier move of this round took it away
                continue
            better = next(
                (s for s in neighbours(current, step, num_steps) if value(s) > value(current)),
                None,
            )
            if better is not None:
                current, improved = better, True
