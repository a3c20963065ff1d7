"""Runs a transformer under a cache: one decision a call, then blocks run or are replaced."""

import zlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import MAX_REDUCED_SUMS, DecisionScope, RankMismatchError

from .blocks import BlockRunner, bind_arguments, sample_of
from .clock import SchedulerClock, TimestepClock
from .context import Branch, CacheSummary, CallRecord, Generation, Trace, layout_of
from .correction import make_correction
from .decision import ActiveCall, reason_for
from .diffusers_adapters.registry import ModelFamily, Streams, config_of
from .intercept import InterceptedCall, handler_of, intercept, release
from .methods import REPLAY, make_method
from .methods.base import BlockCall, Signal, Verdict
from .target_calibration import load_target_calibration
from .xfuser_adapters.pipefusion import FOLLOWED_METHODS, Follower, PipelineStage

DEFAULT_CONTEXT = "default"


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
        self.correction = None
        """Made for every generation, since the pipeline's scheduler may change."""
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
        for branch in self.generation.branches.values():
            # Ranks may leave a generation at different times, so nothing is reduced here.
            local = self.scope.latents_are_split
            if self.correction is not None and branch.correction_state.unread and not local:
                found = self.scope.read([], branch.correction_state.unread)
                self.correction.learn(branch.correction_state, found)
        self._close()

    def _close(self) -> None:
        if self.forecasts and self.correction is not None:
            self.correction.compensation.release()
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
        channels = None
        if self.stage is not None:
            channels = config_of(self.transformer)["in_channels"]
        self.correction = make_correction(
            self.config,
            self.family,
            self.clock,
            scope=self.scope,
            measures=self.measures,
            calibration=self.calibration,
            stage=self.stage,
            latent_channels=channels,
        )
        self.method.begin_generation(self.clock)

    def _new_trace(self) -> Trace:
        return Trace(self.name, config=self.config.to_dict())

    def _branch(self, latents: Tensor) -> Branch:
        """The state of this call's branch, new where none can be continued."""
        layout, name = layout_of(latents), self._branch_name()
        branch = self.generation and self.generation.branches.get(name)
        changed = branch is not None and branch.layout != layout
        if self.clock.run_began() or self.generation is None or changed:
            self._begin_generation()
            branch = None
        return branch or self._new_branch(layout)

    def _branch_name(self) -> str:
        return self.context_name + (self.stage.patch if self.stage is not None else "")

    def _new_branch(self, layout: tuple) -> Branch:
        correction_state = self.correction.new_state() if self.correction else None
        name = self._branch_name()
        method_state = self.method.new_branch_state(name)
        branch = Branch(name, layout, method_state, correction_state)
        self.generation.branches[branch.name] = branch
        return branch

    # -- one call --------------------------------------------------------------------------------

    def run_transformer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the transformer; an exception leaves no state behind."""
        arguments = bind_arguments(self.transformer, args, kwargs)
        given = arguments[self.family.latents]
        latents = self.family.latent_tokens(given)
        timestep = torch.as_tensor(arguments[self.family.timestep])
        self.blocks.executed_flops = 0
        try:
            call = self.active = ActiveCall(latents, given, timestep, self._branch(given))
            if self.decides_outside:
                self._decide(call, None)
            answered = self.decides_outside and not call.record.refreshed
            output = None if answered else original(*args, **kwargs)
            return self._finish(call, output, arguments.get("return_dict", True))
        except BaseException:
            self._close()
            raise
        finally:
            self.active = None

    def run_block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call of a block within a call of the transformer."""
        active = self.active
        if active is None:
            return original(*args, **kwargs)
        call = self.blocks.call(index, original, args, kwargs)
        if call.is_first:
            self._decide(active, call)
        state, record = active.branch.method_state, active.record
        if self.forecasts and not record.refreshed:
            out = call.streams  # the forecast replaces the output
        elif self.literal:
            fresh = self.method.run_block(state, call, None) if record.refreshed else call.run()
            out = self.correction.blend_block(active.branch.correction_state, call, fresh, record)
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
        history, last = call.branch.correction_state, call.branch.last_step
        signal = Signal()
        if block_call is not None:
            signal = self.method.probe(call.branch.method_state, block_call)
        unread = self.correction.unread(history) if self.correction else []
        drift = self.correction.drift_sums(history, call.latents) if self.forecasts else []
        timestep = []
        if self.clock.needs_timestep:
            # In float32: half precision would round the quotient once more.
            timestep = [call.timestep.flatten()[0].float() / self.family.full_noise_timestep]
        # Inside the stack a rank sees its own tokens; the latents outside of it may be whole.
        read = self.scope.read_groups(
            {
                "found": unread,
                "drift": drift,
                "sums": signal.sums,
                "local": signal.local,
                "time": timestep,
            },
            reduced=("found", "drift", "sums") if self.scope.latents_are_split else ("sums",),
        )
        found, drifted, sums, local = (read[name] for name in ("found", "drift", "sums", "local"))
        time = next(iter(read["time"]), None)
        if found:
            self.correction.learn(history, found)
        call.step = self.clock.locate(call.branch.calls, time, last)
        if last is not None and not self.clock.continues(last, call.step):
            self._restart(call, block_call, time)
        self.method.begin_call(call.branch.method_state, call.step)
        verdict = None
        if call.branch.calls > 0 and not self.follows:
            verdict = self.method.verdict(call.branch.method_state, sums, local)
            if drifted:
                call.score = self.correction.score(history, drifted, call.step)
        try:
            self._record(call, self.stage.receive() if self.follows else verdict)
        except RankMismatchError as error:
            if self.led:
                self.stage.pass_on_failure(str(error), block_call.streams, self.family)
            raise

    def _restart(self, call: ActiveCall, block_call: BlockCall | None, time: float | None) -> None:
        """A new run began unannounced: nothing of the old one may be used."""
        self._begin_generation()
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
        corrected_by = self.correction if self.measures else None
        return reason_for(call, verdict, self.config, self.method, corrected_by)

    def _record(self, call: ActiveCall, verdict: Verdict | None) -> None:
        """Note the decision in the trace, and tell the base method."""
        step, score, reason = call.step, call.score, self._reason(call, verdict)
        record = CallRecord(call.branch.name, step.index, step.sigma, reason != "reuse", reason)
        if verdict is not None:
            record.base_signal = verdict.signal
        if score is not None:
            record.weight = score.weight
            record.temporal, record.spatial = score.drift.temporal, score.drift.spatial
            record.expected_offset = score.expected_offset
            record.expected_error, record.tolerance = score.accumulated_error, score.tolerance
        self.method.settle(call.branch.method_state, verdict, record.refreshed)
        call.record, call.verdict = record, None if record.refreshed else verdict
        if call.verdict is not None:
            record.run_blocks, record.kept_tokens = verdict.run_blocks, verdict.kept_tokens
        self.generation.trace.calls.append(record)
        self._check_ranks(call, verdict)
        if self.led:
            self.stage.pass_on(call.verdict)

    def _check_ranks(self, call: ActiveCall, verdict: Verdict | None) -> None:
        """Raise on all ranks if one decided differently, before anything can hang."""
        if not self.scope.check_ranks or self.follows:  # what they follow has been compared
            return
        record, blocks = call.record, verdict.run_blocks if verdict is not None else None
        decision = (call.branch.calls, record.step_index, record.reason, blocks)
        self.scope.check(
            record.step_index,
            record.refreshed,
            zlib.crc32(repr(decision).encode()),
            (record.base_signal, record.weight, record.temporal),
            call.latents.device,
        )

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
            output = self._correct(call, output, return_dict)
            self.correction.answered(branch.correction_state, call.step, record)
            histories = (b.correction_state for b in self.generation.branches.values())
            self.generation.expected_psnr_db = self.correction.expected_psnr_db(histories)
        branch.calls += 1
        branch.last_step = call.step
        if record.refreshed:
            self.generation.measure_memory(
                self.correction.compensation.held() if self.forecasts else []
            )
        return output

    def _correct(self, call: ActiveCall, output: Any, return_dict: bool) -> Any:
        """The forecast for a reused call; for a refreshed one its output, compensated."""
        history, step, record = call.branch.correction_state, call.step, call.record
        self.correction.compensation.called(step, record.refreshed)
        if not record.refreshed:
            sample = self.correction.reuse(
                history, call.given, step, call.score, call.branch.output_dtype
            )
            return output if sample is None else self.family.make_output(sample, return_dict)
        fresh = (self.family.read_output or sample_of)(output)
        call.branch.output_dtype = fresh.dtype
        sample = self.correction.refresh(
            history, call.latents, call.given, fresh, step, call.score, record
        )
        return output if sample is fresh else self.family.make_output(sample, return_dict)


def engine_of(transformer: nn.Module) -> CacheEngine:
    """The engine of an enabled transformer; `ValueError` if its cache is not enabled."""
    engine = getattr(handler_of(transformer), "__self__", None)
    if not isinstance(engine, CacheEngine):
        raise ValueError("no cache is enabled on this transformer; call enable_cache first")
    return engine
