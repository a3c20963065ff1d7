"""Codebooks of AdaCache: from a rate of change to the steps until the next refresh."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_FORM = "{threshold: rate, ...} with rising thresholds above 0 and whole rates of at least 1"


@dataclass(frozen=True, slots=True)
class Codebook:
    """Pairs (threshold, rate), thresholds rising; the next refresh comes ``rate`` steps later."""

    entries: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, entries: Mapping[float, int] | Iterable[tuple[float, int]]) -> "Codebook":
        """Check and build; raises `TypeError` or `ValueError` naming the entry and the form."""
        pairs = list(entries.items() if isinstance(entries, Mapping) else _pairs(entries))
        if not pairs:
            raise ValueError(f"codebook must be {_FORM}, got no entry")
        previous = 0.0
        for threshold, rate in pairs:
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
                raise TypeError(f"codebook must be {_FORM}, got threshold {threshold!r}")
            if isinstance(rate, bool) or not isinstance(rate, int):
                raise TypeError(f"codebook must be {_FORM}, got rate {rate!r}")
            if not math.isfinite(threshold) or threshold <= previous:
                raise ValueError(
                    f"codebook must be {_FORM}, got threshold {threshold} after {previous}"
                )
            if rate < 1:
                raise ValueError(f"codebook must be {_FORM}, got rate {rate}")
            previous = threshold
        return cls(tuple((float(threshold), rate) for threshold, rate in pairs))

    def rate(self, change: float, scale: float = 1.0) -> int:
        """The first rate whose ``threshold * scale > change``, else the last."""
        for threshold, rate in self.entries:
            if change < threshold * scale:
                return rate
        return self.entries[-1][1]


def _pairs(entries: Any) -> list[tuple[Any, Any]]:
    try:
        return [(threshold, rate) for threshold, rate in entries]
    except (TypeError, ValueError):
        raise TypeError(f"codebook must be {_FORM}, got {entries!r}") from None


_PUBLISHED = {
    (30, "fast"): {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1},
    (30, "slow"): {0.08: 3, 0.16: 2, 1.00: 1},
    (100, "fast"): {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.00: 3},
}
"""(sampling steps, name) -> the codebooks published for Open-Sora 1.2 (arXiv 2411.02397)."""

PUBLISHED_NAMES = ("fast", "slow")
PUBLISHED_STEPS = (30, 100)


def nearest_published_steps(num_steps: int) -> int:
    """The step count with published settings that is nearest; halfway, the smaller one."""
    return min(PUBLISHED_STEPS, key=lambda steps: (abs(steps - num_steps), steps))


def published_codebook(name: str, num_steps: int) -> Codebook:
    """The published codebook of the nearest step count; `ValueError` where it has none."""
    key = nearest_published_steps(num_steps), name
    if key not in _PUBLISHED:
        known = ", ".join(f"{name!r} for {steps} steps" for steps, name in _PUBLISHED)
        raise ValueError(
            f"codebook {name!r} is not published for {key[0]} steps, the nearest to {num_steps}; "
            f"accepted: {known}, or thresholds and rates of your own"
        )
    return Codebook.of(_PUBLISHED[key])
