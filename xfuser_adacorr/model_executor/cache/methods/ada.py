"""AdaCache: how fast one residual in the middle of the stack changes sets the next refresh."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.signals import l1_sums, motion_sums, ratio
from xfuser_adacorr.model_executor.cache.step import Step

from .base import BlockCall, Decision, Read, Signal, StackMethod, Streams, reuse_or_base
from .codebook import PUBLISHED_NAMES, Codebook, nearest_published_steps, published_codebook
from .options import StackOptions, check_choice, check_flag, check_number
from .residual import StackResidual

DEFAULT_CODEBOOK = "fast"
DEFAULT_SCALE = 1.0
FORCED_LAST_CALLS = 2

MOREG_WINDOWS = {30: (4, 26), 100: (10, 90)}
"""Sampling steps -> first and last step, counted from 1, whose motion is taken into account."""
MOREG_CENTRE = 0.385
MOREG_POWER = 8
MOREG_GRADIENT = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ada(StackOptions):
    """Compute again after as many steps as a codebook says for the last change.

    ``threshold`` is a factor of the codebook's thresholds; None: 1.
    """

    label: ClassVar[str] = "Ada"

    codebook: str | Mapping[float, int] | Sequence[tuple[float, int]] | None = None
    """``fast`` or ``slow`` as published, or {threshold: rate}, thresholds rising (kept as a tuple
    of pairs); None: the calibrated one, else ``fast``."""
    moreg: bool = False
    """Motion Regularization, for models of videos."""
    moreg_divisor: float = 1.0
    """With ``moreg``: d > 0, which divides the motion; its code divides by 1."""
    calibration: str | None = None
    """File with a fitted codebook; None: the one beside the model, if there is one."""

    def __post_init__(self) -> None:
        StackOptions.__post_init__(self)
        check_flag("moreg", self.moreg)
        check_number("moreg_divisor", self.moreg_divisor, above=0)
        if self.moreg_divisor != 1.0 and not self.moreg:
            raise ValueError("moreg_divisor is for moreg=True, whose motion it divides")
        if self.codebook is not None and self.calibration is not None:
            raise ValueError("codebook and calibration: give one of them, both name a codebook")
        if isinstance(self.codebook, str):
            check_choice("codebook", self.codebook, PUBLISHED_NAMES)
        elif self.codebook is not None:
            object.__setattr__(self, "codebook", Codebook.of(self.codebook).entries)

    def stack_method(self, model, family) -> "RateOfChange":
        from xfuser_adacorr.model_executor.cache.calibration.ada import load_ada_codebook

        if self.moreg and family.num_frames is None:
            raise ValueError(
                f"moreg must be False for {type(model).__name__}: it measures motion from "
                f"frame to frame, and family {family.name!r} describes no frames"
            )
        codebook, name = None, self.codebook
        if self.codebook is None:
            codebook, name = load_ada_codebook(model, self.calibration), DEFAULT_CODEBOOK
        elif not isinstance(self.codebook, str):
            codebook = Codebook(self.codebook)
        if codebook is None and self.num_steps is not None:
            published_codebook(name, self.num_steps)  # raises before the first call
        scale = self.threshold
        if scale is None:
            scale = family.thresholds.get(self.name, family.thresholds.get("Ada", DEFAULT_SCALE))
        motion = self.moreg_divisor if self.moreg else None
        return RateOfChange(scale, codebook or name, motion, self.num_steps, family, model)


@dataclass(slots=True)
class AdaState:
    reference: Tensor | None = None
    """Signal of the last computed call ``[B, N, D]``."""
    stack: StackResidual = field(default_factory=StackResidual)
    unread: list[Tensor] = field(default_factory=list)
    """Sums that the last computed call measured, to be read with the next decision."""
    computed: int | None = None
    """Index of the last computed step."""
    gap: int = 1
    """k: steps from the computed call before it to the last one."""
    rate: int = 1
    change: float | None = None
    """c, once two calls have been compared."""
    motion: float = 1.0
    """m of the last computed call."""


class RateOfChange(StackMethod):
    """Compute again ``rate`` steps after a computed call, by how fast a residual p changes there.

    ``c = |p_old - p| / |p_old| / k`` (sums of magnitudes) on computed calls alone, with k steps
    between them; the codebook's first threshold above c (times ``scale``) gives the rate. p is the
    gated residual of self-attention of the middle block (`BlockList`), or where a family does not
    describe one the whole residual of the middle block. The first two and the last two calls are
    computed. A reused call returns ``h + R`` with the whole stack's residual: the publication adds
    two residuals a block, all from the same call and none changed on the way, which is the same
    sum. Source: Kahatapitiya et al., AdaCache (arXiv 2411.02397).

    With a ``motion_divisor`` d (Motion Regularization), ``c := c * (m + |10 (m - m_prev) / k|)``
    where ``m = (sum |p[1:] - p[:-1]| / sum (|p[1:]| + |p[:-1]|) / 0.385)^8 / d`` over frames in the
    middle of the run and 1 outside of it.

    Raises `ValueError` for a codebook that is not published, and on the first call if the number of
    steps is needed and not known.
    """

    def __init__(
        self,
        scale: float,
        codebook: Codebook | str,
        motion_divisor: float | None,
        num_steps: int | None,
        family: Any,
        model: nn.Module,
    ) -> None:
        self.scale, self.codebook, self.motion_divisor = scale, codebook, motion_divisor
        self.num_steps, self.family, self.stream = num_steps, family, family.output_stream
        self.observe: Callable[[float], None] | None = None
        """Is told c, without MoReg, of every computed call."""
        described = [
            (block, block_list.attention_residual)
            for block_list in family.block_lists
            if block_list.attention_residual is not None
            for block in getattr(model, block_list.attribute)
        ]
        middle = (len(described) - 1) // 2
        self.signal_block, self.attention_residual = described[middle] if described else (None,) * 2

    def new_state(self) -> AdaState:
        return AdaState()

    def measure(self, state: AdaState, call: BlockCall) -> Signal:
        return Signal(state.unread)

    def decide(self, state: AdaState, step: Step, read: Read) -> Decision:
        total = step.index + step.remaining
        if read.inside:
            self._learn(state, read.inside, total)
        due = step.index >= state.computed + state.rate
        return reuse_or_base(not due and step.remaining > FORCED_LAST_CALLS, state.change)

    def _learn(self, state: AdaState, sums: list[float], total: int) -> None:
        """Take in what the last computed call measured."""
        state.unread = []
        change = ratio(*sums[:2]) / state.gap
        if self.observe is not None:
            self.observe(change)
        if self.motion_divisor is not None:
            change *= self._motion_factor(state, ratio(*sums[2:]), total)
        codebook = self.codebook
        if isinstance(codebook, str):
            codebook = published_codebook(codebook, total)
        state.change, state.rate = change, codebook.rate(change, self.scale)

    def _motion_factor(self, state: AdaState, motion: float, total: int) -> float:
        done, steps = state.computed + 1, nearest_published_steps(total)
        first, last = MOREG_WINDOWS[steps]
        within = first * total <= done * steps <= last * total
        factor = (motion / MOREG_CENTRE) ** MOREG_POWER / self.motion_divisor if within else 1.0
        gradient = MOREG_GRADIENT * (factor - state.motion) / state.gap
        state.motion = factor
        return factor + abs(gradient)

    def after_call(self, state: AdaState, step: Step, decision: Decision) -> None:
        needed = isinstance(self.codebook, str) or self.motion_divisor is not None
        if needed and not step.exact and self.num_steps is None:
            raise ValueError(
                "num_steps must be given for Ada on a transformer without its scheduler: its "
                "published codebooks and MoReg depend on it (or give the scheduler, or a codebook "
                "of thresholds and rates without moreg)"
            )
        if decision.compute:
            if state.computed is not None:
                state.gap = step.index - state.computed
            state.computed = step.index

    def run_block(self, state: AdaState, call: BlockCall, decision: Decision) -> Streams:
        out = state.stack.run_block(call, decision, self.stream, keep=not self.signal_only)
        if decision.compute and self._is_signal_block(call):
            self._compare(state, call, out)
        return out

    def _is_signal_block(self, call: BlockCall) -> bool:
        if self.signal_block is not None:
            return call.block is self.signal_block
        return call.index == (call.count - 1) // 2

    def _compare(self, state: AdaState, call: BlockCall, out: Streams) -> None:
        """Compare the signal with that of the computed call before; nothing is read here."""
        if self.attention_residual is not None:
            current = self.attention_residual(call.block, call.arguments)
        else:
            current = out[self.stream] - call.streams[self.stream]
        frames = None
        if self.motion_divisor is not None:
            frames = self.family.num_frames(call.arguments)
            if frames == 1:
                raise ValueError("moreg must be False for a single frame: it measures motion")
        if state.reference is not None:
            state.unread = l1_sums(current, state.reference)
            if frames is not None:
                state.unread += motion_sums(current, frames)
        state.reference = current
