"""What every base method has to say: its signal, its decision, and what stands in for a reuse."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily, Streams


@dataclass(slots=True)
class BlockCall:
    """One block's turn within a transformer call."""

    index: int
    count: int
    """Blocks of the whole stack."""
    block: nn.Module
    arguments: Mapping[str, Any]
    """All block arguments, bound by name."""
    streams: Streams
    run: Callable[..., Streams]
    """``run(**overrides)`` executes the block; without overrides it executes it once."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


@dataclass(frozen=True, slots=True)
class Signal:
    """Scalars to be read on the host before the decision, in one packed vector."""

    sums: list[Tensor] = field(default_factory=list)
    """Added up over the ranks that share the sample."""
    local: list[Tensor] = field(default_factory=list)
    """This rank's own."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A base method's decision about one call."""

    reuse: bool
    signal: float | None
    """What was compared with the threshold; None if nothing was yet."""
    run_blocks: tuple[bool, ...] | None = None
    """Per-block methods: the blocks to execute; None: all or none."""
    kept_tokens: int | None = None
    """Tokens to send through the blocks; None: all or none."""


class BaseMethod(ABC):
    """Decides which calls are computed and what stands in for the others.

    Per call the engine asks `probe` (at the first block), reads its scalars, tells the call's place
    to `begin_call`, asks `verdict` unless the call has no predecessor, tells the outcome to
    `settle`, then sends every block through `run_block`. All state lives in the object from
    `new_state`, one per branch and generation.
    """

    forces_last = True
    """The last call of a generation is always computed."""
    decides_alone = False
    """The calls to compute are given: nothing is measured, and neither a correction nor a rule for
    the last call adds any."""
    reads_output = False
    """`note_output` is to be told the transformer's outputs."""
    max_sums: int | None = None
    """Sums that a signal may have where ranks add them up; None: no limit."""

    def __init__(
        self, config: CacheConfig, family: ModelFamily, transformer: nn.Module, *, signal_only: bool
    ) -> None:
        self.family = family
        self.threshold = config.rel_l1_thresh
        if self.threshold is None:
            self.threshold = family.default_threshold(config)
        if self.threshold is None:
            raise ValueError(
                f"rel_l1_thresh must be given: family {family.name!r} has no default for "
                f"{config.name}"
            )
        self.signal_only = signal_only
        """A correction stands in for reused values: keep no values, just the signal's reference."""

    @abstractmethod
    def new_state(self) -> Any:
        """Fresh state of one branch of one generation."""

    def new_branch_state(self, branch: str) -> Any:
        """`new_state` of the branch so named; most methods treat all alike."""
        return self.new_state()

    def begin_generation(self, clock: Any) -> None:  # noqa: B027
        """A generation begins on the clock's schedule; most methods need not know."""

    def begin_call(self, state: Any, step: Step) -> None:  # noqa: B027
        """Take note of where the call stands, before `verdict`; most methods need not know."""

    @abstractmethod
    def probe(self, state: Any, call: BlockCall) -> Signal:
        """Measure the signal at the first block; empty without a predecessor."""

    @abstractmethod
    def verdict(self, state: Any, sums: list[float], local: list[float]) -> Verdict:
        """Decide from the scalars of `probe`."""

    def follow(self, state: Any, verdict: Verdict) -> None:  # noqa: B027
        """Take over the ``verdict`` of an earlier run on the same call, in place of an own one."""

    @abstractmethod
    def settle(self, state: Any, verdict: Verdict | None, refreshed: bool) -> None:
        """Take note of the outcome, which may be a refresh that others asked for."""

    def note_output(  # noqa: B027
        self, state: Any, arguments: Mapping[str, Any], output: Tensor
    ) -> None:
        """Take note of what a computed call of the transformer returned for its ``arguments``."""

    @abstractmethod
    def run_block(self, state: Any, call: BlockCall, verdict: Verdict | None) -> Streams:
        """Return the block's output streams; ``verdict is None`` is a refresh."""
