"""Runs a transformer under a cache: one decision a call, then blocks run or are replaced."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import MAX_REDUCED_SUMS, DecisionScope, RankMismatchError

from .blocks import BlockRunner, bind_arguments, sample_of
from .clock import SchedulerClock, Step, TimestepClock
from .context import Branch, CacheSummary, Generation, Trace, layout_of
from .correction import make_correction
from .correction.compensation import Compensation
from .decision import ActiveCall, check_ranks, reason_for, record_of
from .diffusers_adapters.registry import ModelFamily, Streams, config_of
from .intercept import InterceptedCall, handler_of, intercept, release
from .methods import REPLAY, make_method
from .methods.base import BlockCall, Signal, Verdict
from .target_calibration import load_target_calibration
from .xfuser_adapters.pipefusion import FOLLOWED_METHODS, Follower, PipelineStage

DEFAULT_CONTEXT = "default"

logger = logging.getLogger(__name__)


class CachedTransformer(InterceptedCall):
    """What an enabled transformer's class adds: it follows the pipeline's cache contexts."""

    @property
    def _cache_config(self) -> CacheConfig:
        return engine_of(self).config

    def cache_context(self, name: str, **kwargs: Any):
        return engine_of(self).context(name)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        engine_of(self).reset()

    def disable_cache(self) -> None:
        engine_of(self).uninstall()


class CacheEngine:
    """One enabled transformer: owns the method, the correction and the state of the generation."""

    def __init__(
        self,
        transformer: nn.Module,
        family: ModelFamily,
        config: CacheConfig,
        clock: SchedulerClock | TimestepClock,
        scope: DecisionScope,
        stage: PipelineStage | None = None,
        replayed: Trace | None = None,
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.config = config
        """Of the traced run where one is ``replayed``."""
        self.name = config.name if replayed is None else REPLAY
        self.clock = clock
        self.scope = scope
        self.stage = stage
        """Place in a pipeline of stages; None: this rank runs all blocks."""
        self.method = make_method(config, family, transformer, replayed)
        self.method.max_sums = MAX_REDUCED_SUMS if scope.is_parallel else None
        self.corrections: list[Any] = []
        """Made for every generation, since the pipeline's scheduler may change: one for the whole
        batch, or one a sample."""
        self.forecasts = config.forecasts_output
        self.led = stage is not None and (self.forecasts or config.use_cache in FOLLOWED_METHODS)
        """The first pipeline stage decides for all."""
        if self.led and not stage.is_first:
            self.method = Follower(self.method)
        self.literal = config.enable_adacorrection and config.adacorr_mode == "literal"
        self.measures = self.forecasts and not self.method.decides_alone
        self.calibration = load_target_calibration(transformer, config) if self.measures else None
        self.decides_outside = (
            self.forecasts
            and stage is None
            and (self.method.decides_alone or config.use_cache == "Auto")
        )
        """The decision needs nothing from inside the transformer, and nor does what stands in."""
        self.blocks = BlockRunner(transformer, family)
        self.context_name = DEFAULT_CONTEXT
        self.generation: Generation | None = None
        self.finished: Generation | None = None
        self.active: ActiveCall | None = None

    # -- installing ------------------------------------------------------------------------------

    def install(self) -> None:
        """Take over the transformer's calls, and its blocks' where the method needs them."""
        intercept(self.transformer, self.run_transformer, CachedTransformer)
        if not self.decides_outside:
            for index, (block, _) in enumerate(self.blocks.stack):
                intercept(block, partial(self.run_block, index))

    def uninstall(self) -> None:
        """Give the transformer back as it was."""
        self.reset()
        if not self.decides_outside:
            for block, _ in self.blocks.stack:
                release(block)
        release(self.transformer)

    # -- generations -----------------------------------------------------------------------------

    @contextmanager
    def context(self, name: str):
        """Names the branch of the calls made inside, as ``CacheMixin.cache_context`` does."""
        outer, self.context_name = self.context_name, name
        try:
            yield
        finally:
            self.context_name = outer

    def reset(self) -> None:
        """End the generation: forget all tensors, keep its trace for `summary`."""
        if self.generation is None:
            return
        # Ranks may leave a generation at different times, so nothing is reduced here.
        if not self.scope.latents_are_split:
            branches = [b for b in self.generation.branches.values() if b.correction is not None]
            unread = {i: branch.correction_state.unread for i, branch in enumerate(branches)}
            for i, found in self.scope.read_groups(unread, reduced=()).items():
                self._learn(branches[i], found)
        self._close()

    def _close(self) -> None:
        for correction in self.corrections if self.forecasts else []:
            correction.compensation.release()
        if self.generation is not None:
            self.generation.forget()
            self.finished, self.generation = self.generation, None

    def summary(self) -> CacheSummary:
        """Summary of the running generation, or of the last one."""
        generation = self.generation or self.finished or Generation(self._new_trace())
        return generation.summary()

    def _begin_generation(self) -> None:
        self.reset()
        self.generation = Generation(self._new_trace())
        self.corrections = self._new_corrections()
        self.method.begin_generation(self.clock)

    def _new_corrections(self) -> list[Any]:
        return [self._new_correction()]

    def _new_correction(self, compensation: Compensation | None = None) -> Any:
        in_stage = self.stage is not None
        return make_correction(
            self.config,
            self.family,
            self.clock,
            scope=self.scope,
            compensation=compensation,
            measures=self.measures,
            calibration=self.calibration,
            stage=self.stage,
            latent_channels=config_of(self.transformer)["in_channels"] if in_stage else None,
        )

    def _new_trace(self) -> Trace:
        return Trace(self.name, config=self.config.to_dict())

    def _branches(self, latents: Tensor) -> list[Branch]:
        """The states of this call's branch (of each sample), empty where none can be continued."""
        layout, name, known = layout_of(latents), self._branch_name(), []
        if self.generation is not None:
            known = [b for b in self.generation.branches.values() if b.name == name]
        changed = any(branch.layout != layout for branch in known)
        if self.clock.run_began() or self.generation is None or changed:
            self._begin_generation()
            known = []
        return known

    def _branch_name(self) -> str:
        return self.context_name + (self.stage.patch if self.stage is not None else "")

    def _new_branch(self, layout: tuple, sample: int | None = None) -> Branch:
        name, correction = self._branch_name(), self.corrections[sample or 0]
        history = correction.new_state() if correction else None
        state = self.method.new_branch_state(name)
        branch = Branch(name, layout, state, correction, history, sample)
        self.generation.branches[name, sample] = branch
        return branch

    # -- one call --------------------------------------------------------------------------------

    def run_transformer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the transformer; an exception leaves no state behind."""
        arguments = bind_arguments(self.transformer, args, kwargs)
        self.blocks.executed_flops = 0
        try:
            return self._answer(partial(original, *args, **kwargs), original, arguments)
        except BaseException:
            self._close()
            raise
        finally:
            self.active = None

    def _answer(
        self, whole: Callable[[], Any], original: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """What the call returns; ``whole()`` runs it as it was made."""
        given = arguments[self.family.latents]
        timestep = torch.as_tensor(arguments[self.family.timestep])
        branch, *_ = self._branches(given) or [self._new_branch(layout_of(given))]
        call = self.active = self._new_call(given, timestep, branch)
        if self.decides_outside:
            self._decide(call, None)
        answered = self.decides_outside and not call.record.refreshed
        output = None if answered else whole()
        return self._finish(call, output, arguments.get("return_dict", True))

    def _new_call(self, given: Tensor, timestep: Tensor, branch: Branch) -> ActiveCall:
        return ActiveCall(self.family.latent_tokens(given), given, timestep, branch)

    def run_block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call of a block within a call of the transformer."""
        active = self.active
        if active is None:
            return original(*args, **kwargs)
        call = self.blocks.call(index, original, args, kwargs)
        if call.is_first:
            self._decide(active, call)
        branch, record = active.branch, active.record
        state = branch.method_state
        if self.forecasts and not record.refreshed:
            out = call.streams  # the forecast replaces the output
        elif self.literal:
            fresh = self.method.run_block(state, call, None) if record.refreshed else call.run()
            out = branch.correction.blend_block(branch.correction_state, call, fresh, record)
        else:
            out = self.method.run_block(state, call, active.verdict)
        if self.led and call.is_last and not self.stage.is_last:
            out = self._passed_on(out, record.refreshed)
        return self.blocks.result(index, out)

    def _passed_on(self, out: Streams, refreshed: bool) -> Streams:
        """What this stage's last block returns: beside the output stream no stale streams.

        xfuser sends the text with the first patch alone, for all patches of the step: where that
        patch is reused, the next stage still needs text that went through the blocks.
        """
        if refreshed:
            names = out.keys() - {self.family.output_stream}
            self.generation.passed_on = {name: out[name] for name in names}
            return out
        return {**out, **self.generation.passed_on}

    def _decide(self, call: ActiveCall, block_call: BlockCall | None) -> None:
        """Read everything the decision needs at once, then refresh or reuse."""
        branch, signal = call.branch, Signal()
        if block_call is not None:
            signal = self.method.probe(branch.method_state, block_call)
        # Inside the stack a rank sees its own tokens; the latents outside of it may be whole.
        read = self.scope.read_groups(
            {
                **self._measured(call),
                "sums": signal.sums,
                "local": signal.local,
                "time": self._timestep(call.timestep),
            },
            reduced=("found", "drift", "sums") if self.scope.latents_are_split else ("sums",),
        )
        time = next(iter(read["time"]), None)
        self._learn(branch, read["found"])
        call.step = self.clock.locate(branch.calls, time, branch.last_step)
        if branch.last_step is not None and not self.clock.continues(branch.last_step, call.step):
            self._restart(call, block_call, time)
        try:
            self._judge(call, read["drift"], read["sums"], read["local"])
        except RankMismatchError as error:
            if self.led:
                self.stage.pass_on_failure(str(error), block_call.streams, self.family)
            raise

    def _measured(self, call: ActiveCall) -> dict[str, list[Tensor]]:
        """Scalars of the correction: what its last refresh found, and the drift since then."""
        correction, history = call.branch.correction, call.branch.correction_state
        return {
            "found": correction.unread(history) if correction else [],
            "drift": correction.drift_sums(history, call.latents) if self.forecasts else [],
        }

    def _timestep(self, timestep: Tensor) -> list[Tensor]:
        """The noise level, where the clock has to be told; half precision would round it again."""
        if not self.clock.needs_timestep:
            return []
        return [timestep.flatten()[0].float() / self.family.full_noise_timestep]

    @staticmethod
    def _learn(branch: Branch, found: list[float]) -> None:
        if found:
            branch.correction.learn(branch.correction_state, found)

    def _judge(
        self, call: ActiveCall, drifted: list[float], sums: list[float], local: list[float]
    ) -> None:
        """Refresh or reuse a call that has its place, by what was read of it."""
        branch = call.branch
        self.method.begin_call(branch.method_state, call.step)
        verdict = None
        if branch.calls > 0 and not self.follows:
            verdict = self.method.verdict(branch.method_state, sums, local)
            if drifted:
                call.score = branch.correction.score(branch.correction_state, drifted, call.step)
        self._record(call, self.stage.receive() if self.follows else verdict)

    def _begin_unannounced(self, last: Step, step: Step) -> None:
        """A new run began: nothing of the one up to ``last`` may be used."""
        if not step.exact and step.sigma == last.sigma and last.index > 0:
            logger.warning(
                "step %d has the noise level of the call before, %.6g, and is taken for the start "
                "of a new run; if the timesteps are rounded (bfloat16), give the scheduler",
                step.index,
                step.sigma,
            )
        self._begin_generation()

    def _restart(self, call: ActiveCall, block_call: BlockCall | None, time: float | None) -> None:
        self._begin_unannounced(call.branch.last_step, call.step)
        call.branch = self._new_branch(call.branch.layout)
        call.step = self.clock.locate(0, time, None)
        if block_call is not None:
            self.method.probe(call.branch.method_state, block_call)

    @property
    def follows(self) -> bool:
        """Whether an earlier pipeline stage decides for this one."""
        return isinstance(self.method, Follower)

    def _reason(self, call: ActiveCall, verdict: Verdict | None) -> str:
        if self.follows:
            return "stage" if verdict is None else "reuse"
        corrected_by = call.branch.correction if self.measures else None
        return reason_for(call, verdict, self.config, self.method, corrected_by)

    def _record(self, call: ActiveCall, verdict: Verdict | None) -> None:
        """Note the decision in the trace, and tell the base method."""
        record = call.record = record_of(call, verdict, self._reason(call, verdict))
        self.method.settle(call.branch.method_state, verdict, record.refreshed)
        call.verdict = None if record.refreshed else verdict
        self.generation.trace.calls.append(record)
        if not self.follows:  # what they follow has been compared
            check_ranks(self.scope, call, verdict)
        if self.led:
            self.stage.pass_on(call.verdict)

    def _finish(self, call: ActiveCall, output: Any, return_dict: bool) -> Any:
        """Account for the call, and correct its output."""
        branch, record = call.branch, call.record
        if record is None:
            raise RuntimeError(
                "the transformer's blocks did not run through the cache; compile its blocks "
                "(compile_repeated_blocks), not the whole transformer, or use Auto"
            )
        if self.decides_outside:
            record.compute_fraction = float(record.refreshed)
        else:
            branch.full_flops = branch.full_flops or self.blocks.executed_flops
            record.compute_fraction = self.blocks.executed_flops / branch.full_flops
        if self.forecasts:
            fresh = self._sample_in(output) if record.refreshed else None
            sample = self._correct(call, fresh)
            if sample is not fresh:
                output = self.family.make_output(sample, return_dict)
        self._account([call])
        return output

    def _sample_in(self, output: Any) -> Tensor:
        return (self.family.read_output or sample_of)(output)

    def _correct(self, call: ActiveCall, fresh: Tensor | None) -> Tensor | None:
        """The forecast for a reused call (on some pipeline stages None); for a refreshed one its
        output, compensated."""
        correction, history = call.branch.correction, call.branch.correction_state
        step, score, record = call.step, call.score, call.record
        correction.compensation.called(step, record.refreshed)
        if fresh is None:
            return correction.reuse(history, call.given, step, score, call.branch.output_dtype)
        call.branch.output_dtype = fresh.dtype
        return correction.refresh(history, call.latents, call.given, fresh, step, score, record)

    def _account(self, calls: list[ActiveCall]) -> None:
        """These calls, answered together, are over."""
        for call in calls:
            branch = call.branch
            if self.forecasts:
                branch.correction.answered(branch.correction_state, call.step, call.record)
            branch.calls += 1
            branch.last_step = call.step
        corrections = self.corrections if self.forecasts else []
        if corrections:
            histories = (b.correction_state for b in self.generation.branches.values())
            self.generation.expected_psnr_db = corrections[0].expected_psnr_db(histories)
        if any(call.record.refreshed for call in calls):
            kept = [tensor for each in corrections for tensor in each.compensation.held()]
            self.generation.measure_memory(kept)


def engine_of(transformer: nn.Module) -> CacheEngine:
    """The engine of an enabled transformer; `ValueError` if its cache is not enabled."""
    engine = getattr(handler_of(transformer), "__self__", None)
    if not isinstance(engine, CacheEngine):
        raise ValueError("no cache is enabled on this transformer; call enable_cache first")
    return engine
