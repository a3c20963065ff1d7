"""The model's call: for a bare model, whose scheduler is not known.

Where a call stands is inferred from the timesteps, and Euler steps ``x <- x + dsigma * output`` are
assumed. Each branch (`cache_context`, or the order of calls at one timestep) is cached by itself: a
forecast of the model's output stands in for it, or values inside the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import bind_arguments
from xfuser_adacorr.model_executor.cache.diffusers_adapters.others import check_alone
from xfuser_adacorr.model_executor.cache.engine import Lane, check_decision
from xfuser_adacorr.model_executor.cache.inputs import records_gradients, same_conditioning
from xfuser_adacorr.model_executor.cache.intercept import (
    Context,
    InterceptedModel,
    intercept,
    release,
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
from xfuser_adacorr.model_executor.cache.run import Slot
from xfuser_adacorr.model_executor.cache.signals import Signal, read
from xfuser_adacorr.model_executor.cache.step import Step, step_from_timestep
from xfuser_adacorr.model_executor.cache.trace import (
    CacheSummary,
    CallRecord,
    Trace,
    new_trace,
    record_of,
    summary_of,
    tensor_bytes,
    warn_if_idle,
)

from .outputs import refreshed_output, reused_output
from .stack import Stack

MOST_BRANCHES = 16
"""Calls without a name at one timestep that may be branches of one step."""
SHORT_RUNS = 4
"""Runs of a single call in a row that tell of rising timesteps."""


@dataclass(slots=True)
class Branch:
    """One branch (``cond``, ``uncond``) of a run."""

    name: str
    layout: tuple
    """Shape, dtype and device of the latents; another layout is another run."""
    lane: Lane | None
    inside: StackRule | None
    calls: int = 0
    last: Step | None = None
    slot: Slot = field(default_factory=Slot)
    """What the model is called with, beside the latents and the timestep; its last output, whose
    form answers have."""
    conditioning: Mapping[str, Any] | None = None
    """What it was last called with, itself."""


@dataclass(slots=True)
class ModelRun:
    """All branches between the start of a run and the next one."""

    trace: Trace
    branches: dict[str, Branch] = field(default_factory=dict)
    timestep: float | None = None
    """Of the last call."""
    place: int = 0
    """How many calls without a name came before the last one at its timestep."""
    peak_bytes: int = 0

    def unnamed(self, timestep: float) -> str:
        """The branch of a call without a name: calls at one timestep are told apart by order."""
        self.place = self.place + 1 if timestep == self.timestep else 0
        self.timestep = timestep
        return "default" if self.place == 0 else f"default[{self.place}]"

    def account_memory(self) -> None:
        branches = self.branches.values()
        states = [
            branch.lane.tensors() if branch.lane is not None else branch.inside.tensors()
            for branch in branches
        ]
        outputs = [branch.slot.output for branch in branches]
        self.peak_bytes = max(self.peak_bytes, tensor_bytes([states, outputs]))


@dataclass(slots=True)
class Asked:
    """A call of the model while it runs."""

    branch: Branch
    call: Call
    timestep: Tensor
    conditioning: Mapping[str, Any]
    inputs_changed: bool = False
    """The model is called with other conditioning: nothing from before holds."""
    decision: Decision | None = None
    record: CallRecord | None = None


class ModelSite:
    """Answers the calls of one bare model."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        names: tuple[str, str, float],
        scope: DecisionScope,
        stack: Stack | None,
    ) -> None:
        self.method, self.model, self.scope, self.stack = method, model, scope, stack
        self.stacks = {} if stack is None else {"": stack}
        self.latents_name, self.timestep_name, self.full_noise = names
        self.context = Context()
        self.run: ModelRun | None = None
        self.finished: ModelRun | None = None
        self._short_runs = 0
        """Runs of a single call, one after the other."""

    # -- taking over -----------------------------------------------------------------------------

    def install(self) -> None:
        intercept(self.model, self.answer, self, InterceptedModel)
        if self.stack is not None:
            self.stack.install()

    def uninstall(self) -> None:
        self.reset()
        if self.stack is not None:
            self.stack.uninstall()
        release(self.model)

    def reset(self) -> None:
        """End the run; its trace stays for `summary`."""
        if self.run is not None:
            warn_if_idle(self.run.trace)
            self.run.branches.clear()
            self.finished, self.run = self.run, None

    def summary(self) -> CacheSummary:
        run = self.run or self.finished or ModelRun(new_trace(self.method))
        return summary_of(run.trace, run.peak_bytes)

    # -- one call --------------------------------------------------------------------------------

    def answer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call; an exception leaves no state behind."""
        arguments = bind_arguments(self.model, args, kwargs)
        if records_gradients(self.model, args, kwargs):
            self.reset()
            return original(*args, **kwargs)
        try:
            return self._answer(lambda: original(*args, **kwargs), arguments)
        except BaseException:
            self.reset()
            raise

    def _answer(self, model: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        latents = arguments[self.latents_name]
        if not isinstance(latents, Tensor):
            raise TypeError(
                f"{self.latents_name} must be a tensor where a bare model is cached, got "
                f"{type(latents).__name__}; enable the cache on the pipeline, or give the scheduler"
            )
        timestep = torch.as_tensor(arguments[self.timestep_name]).amax().float()  # of all tokens
        branch = self._branch_of(latents, timestep)
        apart = (self.latents_name, self.timestep_name)
        conditioning = {name: x for name, x in arguments.items() if name not in apart}
        asked = Asked(branch, Call(latents=latents), timestep / self.full_noise, conditioning)
        if self.stack is None:
            self._decide(asked, None)
            output = model() if asked.decision.compute else None
            executed = float(asked.decision.compute)
        else:
            output, executed = self.stack.run(
                model,
                lambda block: self._decide(asked, block),
                lambda block, decision: self._answer_block(asked.branch, block, decision),
            )
        branch, asked.call.cost = asked.branch, executed
        asked.record.compute_fraction = executed
        asked.record.computed_calls = int(asked.decision.compute)
        rule = branch.lane.rule if branch.lane is not None else branch.inside
        rule.after_call(asked.call, asked.decision)
        if self.stack is not None:
            self.stack.note(asked.record)
        if branch.lane is not None:
            output = self._correct(asked, latents, output)
        branch.calls, branch.last = branch.calls + 1, asked.call.step
        self.run.account_memory()
        return output

    def _answer_block(self, branch: Branch, block: BlockCall, decision: Decision) -> Streams:
        if branch.lane is not None and not decision.compute:
            return block.streams  # the forecast replaces the output
        return self.stack.method.run_block(branch.inside.state, block, decision)

    def _branch_of(self, latents: Tensor, timestep: Tensor) -> Branch:
        """The branch of this call, made where it is new; another layout begins another run."""
        layout = (tuple(latents.shape), latents.dtype, latents.device)
        name = self.context.name
        if self.run is not None and any(b.layout != layout for b in self.run.branches.values()):
            self.reset()
        if self.run is not None and self.run.place >= MOST_BRANCHES - 1:
            warn_once(
                f"{MOST_BRANCHES} calls at one timestep: each was taken for another branch of a "
                "step, so that nothing is reused; name branches with cache_context, or give the "
                "scheduler"
            )
            self.reset()
        if self.run is None:
            self._begin()
        if name is None:
            name = self.run.unnamed(float(timestep))
        return self.run.branches.get(name) or self._new_branch(name, layout)

    def _new_branch(self, name: str, layout: tuple) -> Branch:
        inside = None if self.stack is None else StackRule(self.stack.method, name)
        lane = None
        if self.method.answers_steps:
            rules = {} if inside is None else {"": inside}
            lane = Lane(
                self.method.make_rule(None, rules),
                self.method.make_forecast(self.scope),
                self.method.make_repair(None),
            )
        branch = self.run.branches[name] = Branch(name, layout, lane, inside)
        return branch

    def _decide(self, asked: Asked, block: BlockCall | None) -> Decision:
        """Read everything the decision needs at once, the timestep too, then decide."""
        call, branch = asked.call, asked.branch
        call.block = block
        rule = branch.lane.rule if branch.lane is not None else branch.inside
        signal = rule.measure(call) + Signal(local=[asked.timestep])
        (values,) = read([signal], self.scope)
        call.step = step_from_timestep(
            branch.calls, values.local.pop(), branch.last, self.method.num_steps
        )
        if branch.last is not None and not _continues(
            branch.last, call.step, self.method.num_steps
        ):
            branch = asked.branch = self._restarted(branch, call.step)
            rule = branch.lane.rule if branch.lane is not None else branch.inside
            (values,) = read([rule.measure(call)], self.scope)
            call.step = step_from_timestep(0, call.step.sigma, None, self.method.num_steps)
        decision = rule.decide(call, values)
        asked.inputs_changed = self._changed(branch, asked.conditioning)
        if asked.inputs_changed and not decision.compute:
            decision = decision.turned(True, "inputs")
        asked.decision, asked.record = decision, record_of(branch.name, call.step, decision)
        check_decision(self.scope, call.step, decision, call.latents.device)
        if branch.inside is not None:
            self.stack.method.noted(branch.inside.state, asked.record)
        self.run.trace.calls.append(asked.record)
        return decision

    def _changed(self, branch: Branch, conditioning: Mapping[str, Any]) -> bool:
        """Whether the model is called with other conditioning than the branch was so far.

        Nothing tells the first calls of several runs from those of one, so that what is new in
        every call cannot be learned as under a scheduler: values are compared.
        """
        before, branch.conditioning = branch.conditioning, conditioning
        follows = branch.slot.follows((), conditioning)
        return before is not None and not (follows and same_conditioning(before, conditioning))

    def _restarted(self, branch: Branch, step: Step) -> Branch:
        """A new run began: nothing of the one before may be used."""
        if step.sigma == branch.last.sigma and branch.last.index > 0:
            warn_once(
                f"step {step.index} has the noise level of the call before, {step.sigma:.6g}, and "
                "is taken for the start of a new run; if the timesteps are rounded (bfloat16), "
                "give the scheduler"
            )
        self._short_runs = self._short_runs + 1 if branch.calls == 1 else 0
        if self._short_runs == SHORT_RUNS:
            warn_once(
                "timesteps rise from call to call, or stay as they are, so that every call is "
                "taken for the first of a run and computed; give the scheduler"
            )
        self.reset()
        self._begin()
        return self._new_branch(branch.name, branch.layout)

    def _begin(self) -> None:
        check_alone([self.model])
        self.run = ModelRun(new_trace(self.method))
        if self.stack is not None:
            self.stack.method.begin_run(None)

    def _correct(self, asked: Asked, latents: Tensor, output: Any) -> Any:
        """The forecast for a reused call; for a computed one its output, which repairs."""
        branch, lane, step = asked.branch, asked.branch.lane, asked.call.step
        if not asked.decision.compute:
            return reused_output(lane, step, branch.slot.output)
        if asked.inputs_changed:
            lane.forecast = self.method.make_forecast(self.scope)
            lane.repair = self.method.make_repair(None)
        branch.slot.output = output
        return refreshed_output(
            lane,
            step,
            latents,
            output,
            lambda missed: lane.rule.computed(asked.call, asked.decision, missed, asked.record),
        )


def _continues(last: Step, step: Step, num_steps: int | None) -> bool:
    """False where the noise level did not fall, or the counted steps are over."""
    return step.sigma < last.sigma and not (num_steps is not None and step.index >= num_steps)
