"""The sampler step: all denoiser calls between two steps of the scheduler are skipped together.

Between two ``scheduler.step`` a pipeline calls its denoisers (once, twice for guidance, one of two
experts), guides, and gives one guided output to ``scheduler.step``. The decision is taken before
the first of these calls, from the latents that the last step returned. In a reused step each call
returns what it returned last, whatever the pipeline makes of that is thrown away, and the sampler
steps with the forecast of the guided output.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.adacorrection import warn_once
from xfuser_adacorr.model_executor.cache.engine import Lane, decide, refresh, reuse, scaled
from xfuser_adacorr.model_executor.cache.inputs import (
    STANDS_ASIDE,
    Inputs,
    records_gradients,
    requires_grad,
)
from xfuser_adacorr.model_executor.cache.methods.base import (
    BlockCall,
    Call,
    Decision,
    StackRule,
    Streams,
)
from xfuser_adacorr.model_executor.cache.methods.options import Method
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope, check_decision
from xfuser_adacorr.model_executor.cache.run import Key, Run, RunTracker, Slot, Track
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import STEP_CONTEXT, record_of

from .stack import Stack


class SamplerSite:
    """Answers the steps of the schedulers that ``find_schedulers()`` gives, and the denoisers."""

    def __init__(
        self,
        method: Method,
        denoisers: Mapping[str, nn.Module],
        find_schedulers: Callable[[], Iterable[Any]],
        scope: DecisionScope,
        stacks: Mapping[str, Stack],
    ) -> None:
        self.method, self.scope = method, scope
        self.stacks = {name: each for name, each in stacks.items() if each.measures_inside}
        self.modules = {name: each for name, each in stacks.items() if name not in self.stacks}
        self.tracker = tracker = RunTracker(self, denoisers, find_schedulers, stacks)
        self.context, self.reset, self.summary = tracker.context, tracker.reset, tracker.summary

    def install(self) -> None:
        self.tracker.install()

    def uninstall(self) -> None:
        self.tracker.uninstall()

    # -- denoiser calls --------------------------------------------------------------------------

    def answer_call(
        self, run: Run, key: Key, original: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Return what the call returned last in a reused step, else compute it."""
        inputs, slot = Inputs(args, kwargs), run.slots.get(key)
        fits = slot is not None and inputs.follows(slot.inputs)
        reshaped = slot is not None and inputs.layout != slot.inputs.layout
        if slot is not None:
            slot.inputs = inputs
        run.inputs_changed |= not fits
        if run.decision is None and not self.stacks:
            self._decide(run, None)
        model, asked = partial(original, *args, **kwargs), self.stacks.get(key[0])
        if run.decision is None and asked and records_gradients(asked.model, args, kwargs):
            run.stand_aside()
        if run.decision is None and asked:
            if reshaped:
                run.branches[key[0], "", 0].begin()  # what it remembers has another shape
            output, executed = self._decided_inside(run, asked, key[0], model)
        elif fits and run.decision is not None and not run.decision.compute:
            return slot.output
        elif key[0] in self.modules and run.branches and run.ahead():
            rule, (_, step) = run.branches[key[0], "", 0], run.ahead()[0]
            output, executed = self.modules[key[0]].run_as_it_is(rule, step, model)
        else:
            output, executed = model(), 1.0
        run.cost += executed
        if run.decision is not None and not run.decision.compute and fits:
            return slot.output
        if run.finished:
            return output
        run.gradients |= torch.is_grad_enabled() and requires_grad(output)
        run.made[key], run.slots[key] = True, Slot(output, inputs)
        return output

    def _decided_inside(
        self, run: Run, stack: Stack, name: str, model: Callable[[], Any]
    ) -> tuple[Any, float]:
        """Run a model whose first block tells what the decision is made from."""

        def answer(block: BlockCall, decision: Decision) -> Streams:
            if not decision.compute:
                return block.streams
            if run.finished:  # it was reset while the model ran
                return block.run()
            return stack.method.run_block(run.branches[name, "", 0].state, block, decision)

        return stack.run(
            model, lambda block: self._decide(run, Call(block=block, model=name)), answer
        )

    def _decide(self, run: Run, at: Call | None) -> Decision:
        """Take the decision for all calls of this step; ``at``: where in which model."""
        ahead, rules, calls = run.ahead(), [], []
        if not ahead:  # all known samplers have taken their last step
            run.decision = Decision(True, "first")
            return run.decision
        for track, step in ahead:
            call = Call(step=step) if at is None else replace(at, step=step)
            if track.returned is not None:
                call.latents = scaled(track.returned, step.scale)
            calls.append(call)
            rules.append((track.lane or self._new_lane(run, track)).rule)
        decisions = decide(rules, calls, self.scope)
        decision = next((each for each in decisions if each.compute), decisions[0])
        run.decision = decision = self._overruled(run, calls[0].step, decision)
        for (track, _), call, own in zip(ahead, calls, decisions, strict=True):
            call.block = None
            same = own.compute == decision.compute
            shared = own if same else own.turned(decision.compute, decision.why)
            run.decided[id(track.stepper)] = call, shared
        run.record = record_of(STEP_CONTEXT, calls[0].step, decision)
        if self.scope.check_ranks and calls[0].latents is not None:
            check_decision(self.scope, run.record, calls[0].latents.device)
        return decision

    def _overruled(self, run: Run, step: Step, decision: Decision) -> Decision:
        """The decision, but for what no rule can know."""
        if step.follows:
            decision = decision.turned(run.trace.calls[-1].refreshed, "stage")
        if run.gradients:
            warn_once(STANDS_ASIDE)
            return decision.turned(True, "autograd")
        if run.inputs_changed and not decision.compute:
            return decision.turned(True, "inputs")
        return decision

    # -- sampler steps ---------------------------------------------------------------------------

    def answer_step(
        self,
        run: Run,
        track: Track,
        step: Step,
        original: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Any:
        """Step with the computed output, which teaches, or with the forecast."""
        lane = track.lane or self._new_lane(run, track)
        if track.last is None:
            lane = track.lane = lane.checked(lane, step, arguments)
            run.trace.plan = lane.rule.plan
            if isinstance(arguments.get("pred_original_sample"), torch.Tensor):
                track.output = "pred_original_sample"
        call, decision = run.decided.pop(id(track.stepper), (None, None))
        if call is None or call.step is not step:  # first of a copy, or out of turn
            call, decision = Call(step=step), Decision(True, "first")
        computed = all(run.made.values())
        if not run.stepped:
            run.note(step, computed)
        if not computed and lane.forecast.v0 is None:  # its denoisers' last outputs stand in
            return original(**arguments)
        if decision.compute != computed:
            decision = decision.turned(computed, decision.why)
        call.cost = run.record.compute_fraction
        lane.rule.after_call(call, decision)
        if not computed:
            return reuse(lane, call, original, arguments, track.output)
        run.account_memory()  # with what the skipped steps left
        if run.lines_broken and lane.forecast.v0 is not None:  # nothing from before holds, or fits
            lane.forecast = self.method.make_forecast(self.scope)
            lane.repair = self.method.make_repair(track.stepper)
        call.latents = scaled(arguments["sample"], step.scale)
        result = refresh(lane, call, decision, run.record, original, arguments, track.output)
        run.account_memory()
        return result

    def _new_lane(self, run: Run, track: Track) -> Lane:
        base = {}
        inside = self.stacks | self.modules
        if inside and not run.branches:  # one sampler's rule asks the models
            base = {name: StackRule(each.method) for name, each in inside.items()}
            run.branches = {(name, "", 0): rule for name, rule in base.items()}
        track.lane = self.method.make_lane(
            track.places, track.begin, base, track.stepper, self.scope
        )
        run.trace.plan = track.lane.rule.plan
        return track.lane
