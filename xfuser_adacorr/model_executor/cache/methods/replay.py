"""Replay: the decisions of a saved trace, with the values of the method that was traced."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import STEP_CONTEXT, CallRecord, Trace

from .base import BlockCall, Call, Decision, Read, Rule, Signal, StackMethod, Streams
from .modular import ModuleOptions
from .options import Method, check_count

SIGMA_TOLERANCE = 1e-4
"""Difference of noise levels up to which a step is taken to be the one traced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay(Method):
    """Take the decisions of a trace; values are those of the method that was traced.

    On the machine and with the inputs of the traced run the result is equal bit for bit. Nothing is
    read or sent. Raises `ValueError` for a call that the trace does not have: another branch,
    number of steps or noise level; `FileNotFoundError` for a file that is not there.
    """

    label: ClassVar[str] = "Replay"

    trace: Any
    """The `Trace` whose decisions are taken, or the path of a saved one."""
    num_steps: int | None = None
    """Sampling steps of a bare model, in place of the traced number."""
    traced: Method | None = field(default=None, repr=False)
    """The method that was traced; found in the trace."""

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, least=1, optional=True)
        trace = self.trace
        if isinstance(trace, (str, Path)):
            trace = Trace.load(trace)
        elif isinstance(trace, dict):
            trace = Trace.from_dict(trace)
        check_replayable(trace)
        object.__setattr__(self, "trace", trace)
        object.__setattr__(self, "traced", traced_method(trace, self.num_steps))

    @property
    def needs_blocks(self) -> bool:
        return self.traced.needs_blocks and not self.traced.answers_steps

    @property
    def answers_steps(self) -> bool:
        return self.traced.answers_steps

    @property
    def needs_steps(self) -> bool:
        return self.traced.needs_steps

    def make_rule(self, places, inside) -> "Recorded":
        return Recorded(self.trace)

    def make_stack(self, model, family) -> "RecordedStack":
        return RecordedStack(self.traced.make_stack(model, family), self.trace)

    def bound_to_pipeline(self, pipe, models):
        traced = self.traced
        if self.trace.plan is None and hasattr(traced, "use_plan"):
            traced = replace(traced, use_plan=False)  # there may be one by now
        bound = replace(self)
        object.__setattr__(bound, "traced", traced.bound_to_pipeline(pipe, models))
        return bound

    def make_lane(self, places, begin, inside, stepper, scope):
        lane = self.traced.make_lane(places, begin, inside, stepper, scope)
        own_check = lane.checked

        def checked(lane, step, arguments):
            return self._recorded(own_check(lane, step, arguments))

        lane.checked = checked
        return self._recorded(lane)

    def _recorded(self, lane):
        plan, lane.rule = lane.rule.plan, Recorded(self.trace)
        if self.trace.plan is not None and plan is None:
            raise ValueError(
                f"trace: it followed the plan {self.trace.plan['plan']!r}, which this run does not"
            )
        lane.rule.plan = plan
        return lane

    def make_forecast(self, scope):
        return self.traced.make_forecast(scope)

    def make_repair(self, stepper):
        return self.traced.make_repair(stepper)


def check_replayable(trace: Any) -> None:
    """Raise `TypeError` or `ValueError` for what is no trace that can be replayed."""
    if not isinstance(trace, Trace):
        raise TypeError(f"trace must be a Trace or the path of a saved one, got {trace!r}")
    if trace.config is None:
        raise ValueError(
            "trace: it does not say with which options it was made (schema 1), so that it cannot "
            "be replayed; record it again"
        )
    if not trace.calls:
        raise ValueError("trace: it has no calls")
    if any(call.sample is not None for call in trace.calls):
        raise ValueError("trace: its samples were decided one by one, which cannot be replayed")


def traced_method(trace: Trace, num_steps: int | None = None) -> Method:
    """The method that ``trace`` was made with; ``num_steps`` replaces the recorded number."""
    from xfuser_adacorr.config import from_flat

    method = from_flat(trace.config)
    if isinstance(method, ModuleOptions):
        raise ValueError(
            f"trace: {method.name} acts on modules, and its traces are not replayed; enable it "
            "again, it decides alike"
        )
    return method if num_steps is None else replace(method, num_steps=num_steps)


def by_step(calls: Iterable[CallRecord]) -> dict[int, CallRecord]:
    """Step index -> its record; of several branches one that was refreshed."""
    steps: dict[int, CallRecord] = {}
    for call in calls:
        if call.step_index not in steps or call.refreshed:
            steps[call.step_index] = call
    return steps


def checked_record(records: dict[int, CallRecord], branch: str, step: Step) -> CallRecord:
    """The record of ``step``; `ValueError` if the trace has none at its noise level."""
    record = records.get(step.index)
    if record is None:
        raise ValueError(
            f"trace: branch {branch!r} has no call at step {step.index}; it has "
            f"{len(records)} calls, at steps {min(records)} to {max(records)}"
        )
    if abs(record.sigma - step.sigma) > SIGMA_TOLERANCE:
        raise ValueError(
            f"trace: step {step.index} was at sigma {record.sigma:.6g}, this run's is at "
            f"{step.sigma:.6g}: another number of steps, picture size or sampler"
        )
    return record


def decision_of(record: CallRecord) -> Decision:
    """The decision that a record tells of."""
    return Decision(
        record.refreshed,
        record.reason,
        base_signal=record.base_signal,
        run_blocks=record.run_blocks,
        kept_tokens=record.kept_tokens,
    )


class Recorded(Rule):
    """The recorded decisions of the steps."""

    def __init__(self, trace: Trace) -> None:
        self._steps = by_step(trace.calls)
        self._begun = False

    def decide(self, call: Call, read: Read) -> Decision:
        if not self._begun:  # wherever a run begins, which the sampler may not know yet
            return Decision(True, "first")
        return decision_of(checked_record(self._steps, STEP_CONTEXT, call.step))

    def after_call(self, call: Call, decision: Decision) -> None:
        self._begun = True


@dataclass(slots=True)
class RecordedState:
    inner: Any
    """State of the method that was traced."""
    branch: str = ""
    record: CallRecord | None = None


class RecordedStack(StackMethod):
    """The recorded decisions of the calls of each branch."""

    forces_last = False

    def __init__(self, inner: StackMethod, trace: Trace) -> None:
        self.inner = inner
        self._branches: dict[str, dict[int, CallRecord]] = {}
        for call in trace.calls:
            self._branches.setdefault(call.context, {})[call.step_index] = call

    def begin_run(self, places) -> None:
        self.inner.begin_run(places)

    def new_state(self) -> RecordedState:
        return RecordedState(self.inner.new_state())

    def measure(self, state: RecordedState, call: BlockCall) -> Signal:
        self.inner.measure(state.inner, call)  # keeps what its values are made from
        return Signal()

    def named(self, state: RecordedState, branch: str) -> None:
        state.branch = branch

    def decide(self, state: RecordedState, step: Step, read: Read) -> Decision:
        records = self._branches.get(state.branch)
        if records is None:
            raise ValueError(
                f"trace: it has no branch {state.branch!r}, but "
                f"{', '.join(map(repr, self._branches))}"
            )
        decision = decision_of(checked_record(records, state.branch, step))
        self.inner.follow(state.inner, decision)
        return decision

    def follow(self, state: RecordedState, decision: Decision) -> None:
        self.inner.follow(state.inner, decision)

    def noted(self, state: RecordedState, record: CallRecord) -> None:
        self.inner.noted(state.inner, record)

    def after_call(self, state: RecordedState, step: Step, decision: Decision) -> None:
        self.inner.after_call(state.inner, step, decision)

    def run_block(self, state: RecordedState, call: BlockCall, decision: Decision) -> Streams:
        return self.inner.run_block(state.inner, call, decision)
