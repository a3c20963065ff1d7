"""Replay: the decisions of a saved trace, call by call, with the method that was traced."""

from dataclasses import dataclass, replace
from typing import Any

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.model_executor.cache.clock import Step
from xfuser_adacorr.model_executor.cache.context import CallRecord, Trace

from .base import BaseMethod, BlockCall, Signal, Streams, Verdict

SIGMA_TOLERANCE = 1e-4
"""Difference of noise levels up to which a call is taken to be the one traced."""


def trace_of(config: CacheConfig) -> Trace | None:
    """The trace that ``config`` replays, None for other methods.

    Raises `TypeError` or `ValueError` for what is no trace that can be replayed, and
    `FileNotFoundError`.
    """
    if config.use_cache != "Replay":
        return None
    trace = config.trace
    if isinstance(trace, str):
        trace = Trace.load(trace)
    elif isinstance(trace, dict):
        trace = Trace.from_dict(trace)
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
        raise ValueError(
            "trace: its samples were decided one by one (per_sample), which cannot be replayed"
        )
    return trace


def recorded_config(trace: Trace, num_steps: int | None = None) -> CacheConfig:
    """The options that ``trace`` was made with; ``num_steps`` replaces the recorded number."""
    recorded = CacheConfig.from_dict(trace.config)
    return replace(recorded, num_steps=num_steps or recorded.num_steps)


@dataclass(slots=True)
class ReplayState:
    inner: Any
    """State of the method that was traced."""
    branch: str
    calls: dict[int, CallRecord]
    """Step index -> the call as it was traced."""
    current: CallRecord | None = None


class Replay(BaseMethod):
    """Take the decisions of a trace; values are those of the method that was traced.

    On the machine and with the inputs of the traced run the result is equal bit for bit. Nothing is
    read or sent. Raises `ValueError` for a call that the trace does not have: another branch,
    number of steps or noise level.
    """

    decides_alone = True
    forces_last = False

    def __init__(self, inner: BaseMethod, trace: Trace) -> None:
        self.family = inner.family
        self.signal_only = inner.signal_only
        self.inner = inner
        self.calls: dict[str, dict[int, CallRecord]] = {}
        for call in trace.calls:
            self.calls.setdefault(call.context, {})[call.step_index] = call

    def new_state(self) -> ReplayState:
        raise RuntimeError("a replay's state belongs to a branch")

    def new_branch_state(self, branch: str) -> ReplayState:
        if branch not in self.calls:
            raise ValueError(
                f"trace: it has no branch {branch!r}, but {', '.join(map(repr, self.calls))}"
            )
        return ReplayState(self.inner.new_branch_state(branch), branch, self.calls[branch])

    def begin_generation(self, clock: Any) -> None:
        self.inner.begin_generation(clock)

    def begin_call(self, state: ReplayState, step: Step) -> None:
        call = state.calls.get(step.index)
        if call is None:
            raise ValueError(
                f"trace: branch {state.branch!r} has no call at step {step.index}; it has "
                f"{len(state.calls)} calls, at steps {min(state.calls)} to {max(state.calls)}"
            )
        if abs(call.sigma - step.sigma) > SIGMA_TOLERANCE:
            raise ValueError(
                f"trace: step {step.index} was at sigma {call.sigma:.6g}, this run's is at "
                f"{step.sigma:.6g}: another number of steps, picture size or sampler"
            )
        self.inner.begin_call(state.inner, step)
        state.current = call

    def probe(self, state: ReplayState, call: BlockCall) -> Signal:
        self.inner.probe(state.inner, call)  # keeps what its values are made from
        return Signal()

    def verdict(self, state: ReplayState, sums: list[float], local: list[float]) -> Verdict:
        past = state.current
        verdict = Verdict(not past.refreshed, past.base_signal, past.run_blocks, past.kept_tokens)
        self.inner.follow(state.inner, verdict)
        return verdict

    def settle(self, state: ReplayState, verdict: Verdict | None, refreshed: bool) -> None:
        self.inner.settle(state.inner, verdict, refreshed)

    def run_block(self, state: ReplayState, call: BlockCall, verdict: Verdict | None) -> Streams:
        return self.inner.run_block(state.inner, call, verdict)
