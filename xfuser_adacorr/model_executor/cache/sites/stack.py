"""The stack of blocks: methods that measure, or skip, inside one model."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import timestep_fraction
from xfuser_adacorr.model_executor.cache.engine import check_decision, decide
from xfuser_adacorr.model_executor.cache.inputs import records_gradients
from xfuser_adacorr.model_executor.cache.intercept import intercept, release
from xfuser_adacorr.model_executor.cache.methods.base import (
    BlockCall,
    Call,
    Decision,
    StackMethod,
    StackRule,
    Streams,
)
from xfuser_adacorr.model_executor.cache.methods.options import Method
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.run import Key, Run, RunTracker, Slot
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import CallRecord, record_of
from xfuser_adacorr.model_executor.cache.track import Track

from .blocks import BlockRunner


@dataclass(slots=True)
class ActiveCall:
    """One call of the model while it runs."""

    decide: Callable[[BlockCall], Decision]
    answer: Callable[[BlockCall, Decision], Streams]
    decision: Decision | None = None
    executed: float = 0.0


class Stack:
    """The blocks of one model, taken over for a method inside of it."""

    measures_inside = True
    """Whether a decision about a whole step is taken while the model runs."""

    def __init__(self, model: nn.Module, family: ModelFamily, method: StackMethod) -> None:
        self.model, self.family, self.method = model, family, method
        self.runner = BlockRunner(model, family)
        self._local = threading.local()

    def install(self) -> None:
        for index, (block, _) in enumerate(self.runner.stack):
            intercept(block, partial(self._run_block, index))

    def uninstall(self) -> None:
        for block, _ in self.runner.stack:
            release(block)
        self.runner.begin_run()

    def run(
        self,
        model: Callable[[], Any],
        decide: Callable[[BlockCall], Decision],
        answer: Callable[[BlockCall, Decision], Streams],
    ) -> tuple[Any, float]:
        """What ``model()`` returns, and the share of the blocks that were executed.

        ``decide(call)`` is asked at the first block; each block returns ``answer(call, decision)``.
        Raises `RuntimeError` if the blocks do not run.
        """
        active = self._local.active = ActiveCall(decide, answer)
        try:
            output = model()
        finally:
            self._local.active = None
        if active.decision is None:
            raise RuntimeError(
                "the blocks did not run through the cache; compile the blocks "
                "(compile_repeated_blocks), not the whole model, or use Auto"
            )
        return output, active.executed / len(self.runner.stack)

    def note(self, record: CallRecord) -> None:
        """Say in the record what is known of the last call, beside its share of the blocks."""

    def _run_block(
        self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        active = getattr(self._local, "active", None)
        if active is None:
            return original(*args, **kwargs)

        def executed(share: float) -> None:
            active.executed += share

        call = self.runner.call(index, original, args, kwargs, executed)
        if call.is_first:
            active.decision = active.decide(call)
        return self.runner.result(index, active.answer(call, active.decision))


class StackSite:
    """Answers each denoiser call of a pipeline with the method's own values."""

    def __init__(
        self,
        method: Method,
        denoisers: Mapping[str, nn.Module],
        find_schedulers: Callable[[], Iterable[Any]],
        scope: DecisionScope,
        stacks: Mapping[str, Stack],
    ) -> None:
        self.method, self.scope, self.stacks = method, scope, stacks
        self.tracker = tracker = RunTracker(self, denoisers, find_schedulers, stacks)
        self.install, self.uninstall = tracker.install, tracker.uninstall
        self.context, self.reset, self.summary = tracker.context, tracker.reset, tracker.summary

    def answer_call(
        self, run: Run, key: Key, original: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        slot = run.slots.setdefault(key, Slot())
        known = slot.layout is not None
        # other conditioning, of any denoiser, refreshes the rest of the step
        run.inputs_changed |= not slot.follows(args, kwargs) and known
        stack = self.stacks.get(key[0])
        if stack is not None and not run.branches:
            self._place_first(run, stack, args, kwargs)
        step = run.next_step()
        if stack is None or step is None:
            return original(*args, **kwargs)
        if records_gradients(stack.model, args, kwargs):
            record = record_of(branch_name(key, len(self.stacks)), step, Decision(True, "autograd"))
            run.trace.calls.append(record)
            run.made[key] = True
            return original(*args, **kwargs)
        layout = tuple(x.shape for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        rule = run.branches.get(key)
        if rule is None or run.layouts.get(key) != layout:
            if not run.branches:
                for each in self.stacks.values():
                    each.method.begin_run(next(iter(run.tracks.values())).places)
            rule = run.branches[key] = StackRule(stack.method, branch_name(key, len(self.stacks)))
            run.layouts[key] = layout
        output, record = answer_call(
            self.scope,
            stack,
            rule,
            step,
            lambda: original(*args, **kwargs),
            branch_name(key, len(self.stacks)),
            run.inputs_changed,
        )
        run.made[key] = record.refreshed
        run.trace.calls.append(record)
        run.account_memory()
        return output

    def _place_first(self, run: Run, stack: Stack, args: tuple, kwargs: dict) -> None:
        """Tell samplers that have no ``begin_index`` where the run begins (image-to-image)."""
        unplaced = [t for t in run.tracks.values() if not hasattr(t.stepper, "begin_index")]
        if unplaced and (fraction := timestep_fraction(stack.model, args, kwargs)) is not None:
            for track in unplaced:
                track.guess_begin(fraction)

    def answer_step(
        self,
        run: Run,
        track: Track,
        step: Step,
        original: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Any:
        run.inputs_changed = False
        return original(**arguments)


def answer_call(
    scope: DecisionScope,
    stack: Stack,
    rule: StackRule,
    step: Step,
    model: Callable[[], Any],
    branch: str,
    inputs_changed: bool = False,
) -> tuple[Any, CallRecord]:
    """Decide at the first block and answer the call; returns the output and the record.

    Where the denoisers' ``inputs_changed`` it is computed.
    """
    records: list[CallRecord] = []

    def decide_call(block: BlockCall) -> Decision:
        call = Call(step=step, block=block)
        (decision,) = decide([rule], [call], scope)
        if inputs_changed and not decision.compute:
            decision = decision.turned(True, "inputs")
        record = record_of(branch, step, decision)
        check_decision(scope, step, decision, next(iter(block.streams.values())).device)
        rule.after_call(call, decision)
        stack.method.noted(rule.state, record)
        records.append(record)
        return decision

    output, executed = stack.run(
        model,
        decide_call,
        lambda block, decision: stack.method.run_block(rule.state, block, decision),
    )
    (record,) = records
    record.compute_fraction = executed
    record.computed_calls = int(record.refreshed)
    stack.note(record)
    return output, record


def branch_name(key: Key, models: int) -> str:
    """What the trace calls a call: its cache context, with its model and place if need be."""
    name, context, place = key
    label = context if place == 0 else f"{context}[{place}]"
    return label if models < 2 else f"{name}.{label}"
