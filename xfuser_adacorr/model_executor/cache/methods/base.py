"""What a rule is: it measures, decides, and learns from what was computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.signals import Read, Signal
from xfuser_adacorr.model_executor.cache.step import Step

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.schedulers import Places
    from xfuser_adacorr.model_executor.cache.trace import CallRecord

Streams = dict[str, Tensor]
"""Token streams that flow from block to block, by argument name, each ``[B, N, D]``."""


@dataclass(slots=True)
class BlockCall:
    """One block's turn within a call of the model."""

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


@dataclass(slots=True)
class Call:
    """A sampling step, or one call of a model, that is to be decided."""

    latents: Tensor | None = None
    """Of the step, or as the model is given them; None where a run begins."""
    scale: float = 1.0
    """What they are multiplied by for the model."""
    step: Step | None = None
    """None until what it takes to know the place has been read."""
    block: BlockCall | None = None
    """The first block's turn, where the rule measures inside the model."""
    model: str = ""
    """Name of that model among the pipeline's components."""
    cost: float = 1.0
    """Its compute over that of a full one, once it is over."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to compute, why, and what it was taken from (see `CallRecord`)."""

    compute: bool
    why: str
    weight: float | None = None
    temporal: float | None = None
    spatial: float | None = None
    expected_offset: float | None = None
    expected_error: float | None = None
    tolerance: float | None = None
    base_signal: float | None = None
    run_blocks: tuple[bool, ...] | None = None
    kept_tokens: int | None = None

    def turned(self, compute: bool, why: str) -> "Decision":
        """The same measurements with another outcome."""
        return replace(self, compute=compute, why=why)


class Rule:
    """Decides which steps, or calls, are computed; one object a run (and branch)."""

    plan: Mapping[str, Any] | None = None
    """Name of the learned plan that is followed and its PSNR, as `CacheSummary` has them."""

    def measure(self, call: Call) -> Signal:
        """What the decision needs of ``call``; ``call.step`` need not be known yet."""
        return Signal()

    def decide(self, call: Call, read: Read) -> Decision:
        """The decision, from the values of `measure`."""
        raise NotImplementedError

    def after_call(self, call: Call, decision: Decision) -> None:
        """The call is over: take note of what was decided in the end, maybe by others."""

    def computed(
        self, call: Call, decision: Decision, missed: list[Tensor], record: "CallRecord"
    ) -> None:
        """Take note of a computed call; ``missed`` is `Forecast.missed`, empty without one."""

    def found(self, missed: list[Tensor]) -> None:
        """What the last computed call missed, where that is known later (`computed`)."""

    def tensors(self) -> list[Tensor]:
        """What is kept, for the memory account."""
        return []


class PerModel(Rule):
    """The rule of the model that is called, where a pipeline has several (two experts)."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.rules = rules

    def measure(self, call: Call) -> Signal:
        return self.rules[call.model].measure(call)

    def decide(self, call: Call, read: Read) -> Decision:
        return self.rules[call.model].decide(call, read)

    def after_call(self, call: Call, decision: Decision) -> None:
        if call.model in self.rules:
            self.rules[call.model].after_call(call, decision)

    def tensors(self) -> list[Tensor]:
        return [tensor for rule in self.rules.values() for tensor in rule.tensors()]


class Either(Rule):
    """Compute where the ``base`` method asks for it or its ``correction`` does."""

    def __init__(self, base: Rule, correction: Rule) -> None:
        self.base, self.correction = base, correction

    def measure(self, call: Call) -> Signal:
        return self.base.measure(call) + self.correction.measure(call)

    def decide(self, call: Call, read: Read) -> Decision:
        base = self.base.decide(call, Read(inside=read.inside, local=read.local))
        own = self.correction.decide(call, Read(outside=read.outside))
        own = replace(own, base_signal=base.base_signal)
        if own.why in ("first", "last") or not base.compute:
            return own
        return own.turned(True, base.why)

    def after_call(self, call: Call, decision: Decision) -> None:
        self.base.after_call(call, decision)
        self.correction.after_call(call, decision)

    def computed(self, call, decision, missed, record) -> None:
        self.base.computed(call, decision, missed, record)
        self.correction.computed(call, decision, missed, record)

    def found(self, missed: list[Tensor]) -> None:
        self.correction.found(missed)

    def tensors(self) -> list[Tensor]:
        return [*self.base.tensors(), *self.correction.tensors()]


class Warmup(Rule):
    """Compute the first ``calls``, whatever ``rule`` decides."""

    def __init__(self, rule: Rule, calls: int) -> None:
        self.rule, self.calls = rule, calls
        self._seen = 0

    def measure(self, call: Call) -> Signal:
        return self.rule.measure(call)

    def decide(self, call: Call, read: Read) -> Decision:
        decision = self.rule.decide(call, read)
        if self._seen < self.calls and decision.why != "first":
            return decision.turned(True, "warmup")
        return decision

    def after_call(self, call: Call, decision: Decision) -> None:
        self._seen += 1
        self.rule.after_call(call, decision)

    def computed(self, call, decision, missed, record) -> None:
        self.rule.computed(call, decision, missed, record)

    def found(self, missed: list[Tensor]) -> None:
        self.rule.found(missed)

    def tensors(self) -> list[Tensor]:
        return self.rule.tensors()


class StackMethod:
    """A method inside the model: its signal, its test, and what stands in for skipped blocks.

    State is the caller's (`new_state`): one for each branch of a run.
    """

    forces_last = True
    """Whether the last call of a run is always computed."""
    max_sums: int | None = None
    """Sums that a signal may have where ranks add them up; None: no limit."""
    signal_only = False
    """A correction stands in for reused values: keep no values, just the signal's reference."""
    warmup = 0
    """Calls of a branch that are computed first, whatever the method decides."""

    def begin_run(self, places: "Places | None") -> None:
        """A run begins on these steps; None where they are not known beforehand."""

    def new_state(self) -> Any:
        """Fresh state of one branch of one run."""
        raise NotImplementedError

    def begin_call(self, state: Any, step: Step) -> None:
        """A call at ``step`` is about to be decided."""

    def named(self, state: Any, branch: str) -> None:
        """``state`` is that of the ``branch`` so named."""

    def measure(self, state: Any, call: BlockCall) -> Signal:
        """Measure at the first block; an empty signal without a predecessor."""
        raise NotImplementedError

    def decide(self, state: Any, step: Step, read: Read) -> Decision:
        """Decide from the values of `measure`; asked from a branch's second call on."""
        raise NotImplementedError

    def follow(self, state: Any, decision: Decision) -> None:
        """Take over the decision of an earlier run on the same call, in place of an own one."""

    def after_call(self, state: Any, step: Step, decision: Decision) -> None:
        """Take note of the outcome, which may be a refresh that others asked for."""

    def noted(self, state: Any, record: "CallRecord") -> None:
        """``record`` is the trace's of the call that is now answered."""

    def run_block(self, state: Any, call: BlockCall, decision: Decision) -> Streams:
        """Return the block's output streams."""
        raise NotImplementedError


class StackRule(Rule):
    """The test of a `StackMethod` as a rule, with the state of one branch."""

    def __init__(self, method: StackMethod, branch: str = "") -> None:
        self.method, self.branch = method, branch
        self.begin()

    def begin(self) -> None:
        """Forget all calls: the next one is the first."""
        self.state, self._calls = self.method.new_state(), 0
        self.method.named(self.state, self.branch)

    def measure(self, call: Call) -> Signal:
        return self.method.measure(self.state, call.block)

    def tensors(self) -> list[Tensor]:
        return [self.state]

    def decide(self, call: Call, read: Read) -> Decision:
        self.method.begin_call(self.state, call.step)
        if self._calls == 0:
            return Decision(True, "first")
        decision = self.method.decide(self.state, call.step, read)
        if self._calls < self.method.warmup:
            return decision.turned(True, "warmup")
        forced = self.method.forces_last and not self.method.signal_only
        if forced and call.step.is_last:
            return decision.turned(True, "last")
        return decision

    def after_call(self, call: Call, decision: Decision) -> None:
        self._calls += 1
        self.method.after_call(self.state, call.step, decision)


def reuse_or_base(reuse: bool, signal: float | None, **details: Any) -> Decision:
    """A base method's own decision."""
    return Decision(not reuse, "reuse" if reuse else "base", base_signal=signal, **details)
