"""GOC: reused module outputs go on in the direction that they moved last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.utils import _pytree as pytree

from xfuser_adacorr.model_executor.cache.step import Step

from .fora import FORA, EveryNth
from .modular import ModuleState
from .options import check_number

LAST_CORRECTED = 3
"""Steps that are left after the last corrected one, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GOC(FORA):
    """FORA with gradient-optimised reuse: ``f + factor * (f1 - f2)`` in some of the steps.

    ``f1`` and ``f2`` are the last two outputs that were used, ``f`` the cached one.
    """

    label: ClassVar[str] = "GOC"

    interval: int = 2
    factor: float = 1.2
    """k >= 0; 1.2 is published on FORA."""
    corrected_steps: Sequence[int] | None = None
    """Indices of the corrected steps; None: all that reuse, but for those near the end."""

    def __post_init__(self) -> None:
        FORA.__post_init__(self)
        check_number("factor", self.factor, least=0)
        given = self.corrected_steps
        if given is not None:
            wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, int)]
            if wrong:
                raise TypeError(f"corrected_steps must be indices of steps, got {wrong[0]!r}")
            object.__setattr__(self, "corrected_steps", tuple(given))

    def make_modules(self) -> "Continued":
        return Continued(self.interval, self.factor, self.corrected_steps)


class Continued(EveryNth):
    """`EveryNth` with reuse that goes on as the last used outputs did."""

    def __init__(self, interval: int, factor: float, steps: Sequence[int] | None) -> None:
        super().__init__(interval)
        self.factor, self.steps = factor, steps

    def corrects(self, step: Step) -> bool:
        if self.steps is not None:
            return step.index in self.steps
        return step.remaining - 1 >= LAST_CORRECTED

    def run_block(self, state: ModuleState, call: Any, decision: Any) -> Any:
        out = EveryNth.run_block(self, state, call, decision)
        one, _ = state.notes.get(call.key, (None, None))
        state.notes[call.key] = out, one
        return out

    def reused(self, state: ModuleState, call: Any) -> Any:
        cached = state.outputs[call.key]
        one, two = state.notes[call.key]
        if two is None or not self.corrects(state.step):
            return cached
        return pytree.tree_map(lambda f, a, b: f + self.factor * (a - b), cached, one, two)
