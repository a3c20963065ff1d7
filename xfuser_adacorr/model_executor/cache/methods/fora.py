"""FORA: every module computed in every N-th step, and reused in the others."""

from dataclasses import dataclass
from typing import ClassVar

from .modular import ModuleMethod, ModuleOptions
from .options import check_count


@dataclass(frozen=True, kw_only=True, slots=True)
class FORA(ModuleOptions):
    """Compute all attention and feed-forward modules in every ``interval``-th step.

    Counted down to the last step, which is computed, as is the first (arXiv 2407.01425).
    """

    label: ClassVar[str] = "FORA"

    interval: int = 3
    """N >= 1: steps from one computed step to the next."""

    def __post_init__(self) -> None:
        ModuleOptions.__post_init__(self)
        check_count("interval", self.interval, least=1)

    def make_modules(self) -> "EveryNth":
        return EveryNth(self.interval)


class EveryNth(ModuleMethod):
    """Computes iff the steps that are left after this one are a multiple of ``interval``."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def gates(self, state, step, read) -> list[bool]:
        return [(step.remaining - 1) % self.interval == 0] * max(len(self.places), 1)
