"""A model that PipeFusion split into stages: what this rank's stage answers.

The first stage is given the latents: it measures and decides. The last one has the output: it
extrapolates, repairs, and tells the first what its refreshes found. Stages between pass on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.adacorrection import EulerRepair, NoRepair, Repair
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
    ModelFamily,
    bind_arguments,
    config_of,
)
from xfuser_adacorr.model_executor.cache.engine import Lane, check_decision, decide
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
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope, RankMismatchError
from xfuser_adacorr.model_executor.cache.schedulers import (
    Places,
    read_places,
    repair_of,
    unwrapped,
)
from xfuser_adacorr.model_executor.cache.sites.outputs import (
    refreshed_output,
    reused_output,
    sample_of,
)
from xfuser_adacorr.model_executor.cache.sites.stack import Stack
from xfuser_adacorr.model_executor.cache.step import Step
from xfuser_adacorr.model_executor.cache.trace import (
    CacheSummary,
    CallRecord,
    Trace,
    new_trace,
    record_of,
    summary_of,
    tensor_bytes,
)

from .last_stage import LastStageSteps
from .pipefusion import FOLLOWED_METHODS, Followed, PipelineStage


@dataclass(slots=True)
class Part:
    """A branch of one part of the latents: whole while warming up, then patch by patch."""

    name: str
    layout: tuple
    lane: Lane | None
    inside: StackRule
    last: Step | None = None
    ticket: int | None = None
    """First stage: of the refreshed call that the last stage tells more of."""
    template: Any = None


@dataclass(slots=True)
class StagedRun:
    trace: Trace
    timesteps: Tensor
    places: Places
    parts: dict[str, Part] = field(default_factory=dict)
    passed_on: dict[str, Tensor] = field(default_factory=dict)
    """The streams beside the output stream, as last computed."""
    steps: LastStageSteps | None = None
    """Last stage, under a multistep sampler: its steps, which repair."""
    peak_bytes: int = 0


@dataclass(slots=True)
class Asked:
    part: Part
    call: Call
    decision: Decision | None = None
    record: CallRecord | None = None


class StagedSite:
    """Answers the calls of this rank's stage."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        family: ModelFamily,
        find_schedulers: Callable[[], Iterable[Any]],
        scope: DecisionScope,
        stage: PipelineStage,
    ) -> None:
        self.method, self.model, self.family = method, model, family
        self.find_schedulers, self.scope, self.stage = find_schedulers, scope, stage
        self.led = method.answers_steps or method.label in FOLLOWED_METHODS
        """The first stage decides for all."""
        if self.led and not stage.is_first:
            inside = Followed(family.output_stream)
            inside.signal_only = method.answers_steps
        elif method.needs_blocks:
            inside = method.make_stack(model, family)
        else:
            inside = Followed(family.output_stream)
            inside.signal_only = True
        self.stack = Stack(model, family, inside)
        self.context = Context()
        self.run: StagedRun | None = None
        self.finished: StagedRun | None = None

    # -- taking over -----------------------------------------------------------------------------

    def install(self) -> None:
        intercept(self.model, self.answer, self, InterceptedModel)
        self.stack.install()

    def uninstall(self) -> None:
        self.reset()
        self.stack.uninstall()
        release(self.model)

    def reset(self) -> None:
        """End the run; its trace stays for `summary`."""
        if self.run is not None:
            if self.run.steps is not None:
                self.run.steps.release()
            self.run.parts.clear()
            self.run.passed_on, self.run.steps = {}, None
            self.finished, self.run = self.run, None

    def summary(self) -> CacheSummary:
        run = self.run or self.finished
        if run is None:
            return summary_of(new_trace(self.method))
        return summary_of(run.trace, run.peak_bytes)

    # -- one call --------------------------------------------------------------------------------

    def answer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call; an exception leaves no state behind."""
        arguments = bind_arguments(self.model, args, kwargs)
        try:
            return self._answer(lambda: original(*args, **kwargs), arguments[self.family.latents])
        except BaseException:
            self.reset()
            raise

    def _answer(self, model: Callable[[], Any], given: Tensor) -> Any:
        part = self._part(given)
        index = self.stage.first_step if part.last is None else part.last.index + 1
        asked = Asked(part, Call(latents=given, step=self.run.places.steps[index]))
        output, executed = self.stack.run(
            model,
            lambda block: self._decide(asked, block),
            lambda block, decision: self._answer_block(asked, block, decision),
        )
        asked.record.compute_fraction = executed
        asked.record.computed_calls = int(asked.decision.compute)
        if part.lane is not None:
            output = self._correct(asked, output)
        part.last = asked.call.step
        states = [
            (p.lane.tensors() if p.lane else p.inside.tensors()) for p in self.run.parts.values()
        ]
        steps = self.run.steps.tensors() if self.run.steps is not None else []
        held = tensor_bytes([states, steps, self.run.passed_on])
        self.run.peak_bytes = max(self.run.peak_bytes, held)
        return output

    def _part(self, given: Tensor) -> Part:
        """The part that this call is about; new timesteps or another layout begin another run."""
        (stepper, *_) = self.find_schedulers()
        scheduler = unwrapped(stepper)
        name = (self.context.name or "default") + self.stage.patch
        layout = (tuple(given.shape), given.dtype, given.device)
        known = self.run.parts.get(name) if self.run is not None else None
        changed = known is not None and known.layout != layout
        if self.run is None or self.run.timesteps is not scheduler.timesteps or changed:
            self.reset()
            trace = new_trace(self.method)
            places = read_places(scheduler, latents_known=False)
            self.run, known = StagedRun(trace, scheduler.timesteps, places), None
        return known or self._new_part(name, layout, stepper)

    def _new_part(self, name: str, layout: tuple, stepper: Any) -> Part:
        inside, lane = StackRule(self.stack.method, name), None
        if self.method.answers_steps:
            lane = Lane(
                self.method.make_rule(None, {"": inside} if self.method.needs_blocks else {}),
                self.method.make_forecast(self.scope),
                self._repair(stepper),
            )
            channels = config_of(self.model)["in_channels"]
            lane.forecast.view = lambda output: output[:, :channels] if output.ndim > 3 else output
        part = self.run.parts[name] = Part(name, layout, lane, inside)
        return part

    def _repair(self, stepper: Any) -> Repair:
        """What the last stage, which steps the sampler, puts into the outputs of this part."""
        if not self.stage.is_last:
            return NoRepair()
        scheduler = unwrapped(stepper)
        kind = repair_of(scheduler)
        if kind == "euler":
            return EulerRepair()
        if kind == "resample" and not self.stage.patch:
            self.run.steps = self.run.steps or LastStageSteps(stepper)
            return NoRepair()
        where = " in PipeFusion's patches" if kind == "resample" else ""
        warn_once(f"{type(scheduler).__name__}{where}: AdaCorrection extrapolates without repair")
        return NoRepair()

    def _decide(self, asked: Asked, block: BlockCall) -> Decision:
        part, call = asked.part, asked.call
        call.block = block
        rule = part.lane.rule if part.lane is not None else part.inside
        follows = self.led and not self.stage.is_first
        if follows:
            decision = self.stage.receive()
        else:
            if part.ticket is not None:  # what the last stage found at this part's last refresh
                found = self.stage.receive_found(part.ticket)
                part.lane.rule.found([torch.tensor(value) for value in found])
                part.ticket = None
            (decision,) = decide([rule], [call], self.scope)
            if part.lane and not decision.compute and self.stage.ends_warmup(call.step):
                # Patches begin with histories of their own, so what is owed is paid before.
                decision = decision.turned(True, "patches")
            rule.after_call(call, decision)
        asked.decision, asked.record = decision, record_of(part.name, call.step, decision)
        self.run.trace.calls.append(asked.record)
        if not follows:  # what they follow has been compared
            try:
                check_decision(self.scope, call.step, decision, call.latents.device)
            except RankMismatchError as error:
                if self.led:
                    self.stage.pass_on_failure(str(error), block.streams, self.family)
                raise
        if self.led:
            self.stage.pass_on(decision)
        return decision

    def _answer_block(self, asked: Asked, block: BlockCall, decision: Decision) -> Streams:
        if asked.part.lane is not None and not decision.compute:
            out = block.streams
        else:
            out = self.stack.method.run_block(asked.part.inside.state, block, decision)
        if self.led and block.is_last and not self.stage.is_last:
            return self._passed_on(out, decision.compute)
        return out

    def _passed_on(self, out: Streams, computed: bool) -> Streams:
        """What this stage's last block returns: beside the output stream no stale streams.

        xfuser sends the text with the first patch alone, for all patches of the step: where that
        patch is reused, the next stage still needs text that went through the blocks.
        """
        if computed:
            names = out.keys() - {self.family.output_stream}
            self.run.passed_on = {name: out[name] for name in names}
            return out
        return {**out, **self.run.passed_on}

    def _correct(self, asked: Asked, output: Any) -> Any:
        part, lane, call, step = asked.part, asked.part.lane, asked.call, asked.call.step
        if asked.decision.compute and self.stage.is_first:
            lane.rule.computed(call, asked.decision, [], asked.record)
            part.ticket = None if step.is_last else self.stage.ticket
        if not self.stage.is_last:
            return output
        if self.run.steps is not None and not self.stage.patch:
            self.run.steps.called(step, asked.decision.compute)
        if not asked.decision.compute:
            return reused_output(lane, step, part.template)
        part.template = output

        def tell(missed: list[Tensor]) -> None:
            if not step.is_last:  # nobody asks what the last refresh found
                self.stage.send_found(torch.stack(missed).tolist())

        return refreshed_output(lane, step, sample_of(output), output, tell)
