"""The sampler step: all denoiser calls between two steps of the scheduler are skipped together.

Between two ``scheduler.step`` a pipeline calls its denoisers (once, twice for guidance, one of two
experts), guides, and gives one guided output to ``scheduler.step``. The decision is taken before
the first of these calls, from the latents that the last step returned. In a reused step each call
returns what it returned last, whatever the pipeline makes of that is thrown away, and the sampler
steps with the forecast of the guided output.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.engine import Lane, check_decision, decide, refresh, reuse
from xfuser_adacorr.model_executor.cache.inputs import (
    STANDS_ASIDE,
    records_gradients,
    requires_grad,
)
from xfuser_adacorr.model_executor.cache.messages import warn_once
from xfuser_adacorr.model_executor.cache.methods.base import (
    BlockCall,
    Call,
    Decision,
    StackRule,
    Streams,
)
from xfuser_adacorr.model_executor.cache.methods.options import Method
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.run import Key, Run, RunTracker, Slot
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.track import Track

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
        name, model = key[0], partial(original, *args, **kwargs)
        slot, inside = run.slots.setdefault(key, Slot()), self.stacks.get(name)
        layout = slot.layout
        fits = slot.follows(args, kwargs)
        run.inputs_changed |= not fits
        if run.decision is None and not self.stacks:
            self._decide(run)
        if run.decision is None and inside and records_gradients(inside.model, args, kwargs):
            run.gradients, run.decision = True, Decision(True, "autograd")
        if run.decision is None and inside:
            if layout not in (None, slot.layout):
                run.branches[name, "", 0].begin()  # what it remembers has another shape
            output, executed = self._decided_inside(run, inside, name, model)
        elif fits and run.decision is not None and not run.decision.compute:
            return slot.output
        elif name in self.modules and run.branches and (step := run.next_step()):
            rule = run.branches[name, "", 0]
            output, executed = self.modules[name].run_as_it_is(rule, step, model)
        else:
            output, executed = model(), 1.0
        run.cost += executed
        if run.decision is not None and not run.decision.compute and fits:
            return slot.output
        if not run.finished:  # it may have been reset while the model ran
            run.gradients |= torch.is_grad_enabled() and requires_grad(output)
            run.made[key], slot.output = True, output
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

        return stack.run(model, lambda block: self._decide(run, block, name), answer)

    def _decide(self, run: Run, block: BlockCall | None = None, model: str = "") -> Decision:
        """Take the decision for all calls of this step; ``block``: where in which ``model``."""
        tracks = [each for each in run.tracks.values() if each.upcoming]
        if not tracks:  # all known samplers have taken their last step
            run.decision = Decision(True, "first")
            return run.decision
        rules = [(each.lane or self._new_lane(run, each)).rule for each in tracks]
        calls = [
            Call(each.returned, each.upcoming.scale, each.upcoming, block, model) for each in tracks
        ]
        decisions = decide(rules, calls, self.scope)
        decision = next((each for each in decisions if each.compute), decisions[0])
        if calls[0].step.follows:
            decision = decision.turned(run.trace.calls[-1].refreshed, "stage")
        if run.gradients:
            warn_once(STANDS_ASIDE)
            decision = decision.turned(True, "autograd")
        elif run.inputs_changed and not decision.compute:
            decision = decision.turned(True, "inputs")
        run.decision = decision
        for track, call, own in zip(tracks, calls, decisions, strict=True):
            call.block = None
            run.decided[id(track.stepper)] = call, own
        if self.scope.check_ranks and calls[0].latents is not None:
            check_decision(self.scope, calls[0].step, decision, calls[0].latents.device)
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
            call, decision = Call(scale=step.scale, step=step), Decision(True, "first")
        computed = all(run.made.values())
        if not run.stepped:
            run.note(step, computed)
        if not computed and lane.forecast.v0 is None:  # its denoisers' last outputs stand in
            return original(**arguments)
        if decision.compute != computed:
            decision = decision.turned(computed, run.record.reason)
        call.cost = run.record.compute_fraction
        lane.rule.after_call(call, decision)
        if not computed:
            return reuse(lane, call, original, arguments, track.output)
        run.account_memory()  # with what the skipped steps left
        if run.lines_broken and lane.forecast.v0 is not None:  # nothing from before holds, or fits
            lane.forecast = self.method.make_forecast(self.scope)
            lane.repair = self.method.make_repair(track.stepper)
        result = refresh(lane, call, decision, run.record, original, arguments, track.output)
        run.account_memory()
        return result

    def _new_lane(self, run: Run, track: Track) -> Lane:
        base, inside = {}, self.stacks | self.modules
        if inside and not run.branches:  # one sampler's rule asks the models
            base = {name: StackRule(each.method) for name, each in inside.items()}
            run.branches = {(name, "", 0): rule for name, rule in base.items()}
        track.lane = self.method.make_lane(
            track.places, track.begin, base, track.stepper, self.scope
        )
        run.trace.plan = track.lane.rule.plan
        return track.lane
