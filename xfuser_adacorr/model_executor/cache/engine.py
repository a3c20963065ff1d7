"""Runs a transformer under a cache: one decision a call, then blocks run or are replaced."""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import DecisionScope
from xfuser_adacorr.core.flops import count_flops

from .clock import SchedulerClock, Step, TimestepClock
from .context import Branch, CacheSummary, CallRecord, Generation, Trace, layout_of
from .correction.adacorrection import AdaCorrection, Score
from .correction.literal import LiteralCorrection
from .diffusers_adapters.registry import BlockList, ModelFamily, Streams
from .intercept import InterceptedCall, intercept, release
from .methods import METHOD_CLASSES
from .methods.base import BlockCall, Signal, Verdict

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = "default"
EULER_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


@lru_cache(maxsize=None)
def _forward_signature(cls: type) -> inspect.Signature:
    signature = inspect.signature(getattr(cls, "_intercepts", cls).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def bind_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``module.forward`` by name, however they were passed."""
    return dict(_forward_signature(type(module)).bind(*args, **kwargs).arguments)


def steps_by_euler(scheduler: Any) -> bool:
    """Whether the sampler steps ``x <- x + dsigma * output``, so that a debt can be paid later."""
    is_euler = type(scheduler).__name__ in EULER_SCHEDULERS
    return is_euler and not getattr(scheduler.config, "stochastic_sampling", False)


@dataclass(slots=True)
class ActiveCall:
    """One transformer call while it runs."""

    latents: Tensor
    timestep: Tensor
    branch: Branch
    step: Step | None = None
    record: CallRecord | None = None
    verdict: Verdict | None = None
    """The base method's decision if the call is reused, else None."""
    score: Score | None = None
    flops: int = 0


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
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.config = config
        self.clock = clock
        self.scope = scope
        self.adaptive = config.enable_adacorrection and config.adacorr_mode == "adaptive"
        self.literal: LiteralCorrection | None = None
        if config.enable_adacorrection and config.adacorr_mode == "literal":
            self.literal = LiteralCorrection(
                gamma=config.adacorr_gamma,
                lambda_=config.adacorr_lambda,
                stream=family.output_stream,
            )
        self.method = METHOD_CLASSES[config.use_cache](
            config, family, transformer, signal_only=config.enable_adacorrection
        )
        self.decides_outside = self.adaptive and config.use_cache == "Auto"
        """The decision needs nothing from inside the transformer."""
        self.correction: AdaCorrection | LiteralCorrection | None = None
        self.context_name = DEFAULT_CONTEXT
        self.generation: Generation | None = None
        self.finished: Generation | None = None
        self.active: ActiveCall | None = None
        self.blocks: list[nn.Module] = []
        self._block_flops: dict[tuple, int] = {}

    # -- installing ------------------------------------------------------------------------------

    def install(self) -> None:
        """Take over the calls of the transformer, and of its blocks where the method needs them."""
        intercept(self.transformer, self.run_transformer, CachedTransformer)
        if self.decides_outside:
            return
        listed = [
            (block, block_list)
            for block_list in self.family.block_lists
            for block in getattr(self.transformer, block_list.attribute)
        ]
        for index, (block, block_list) in enumerate(listed):
            intercept(block, partial(self.run_block, block, block_list, index))
            self.blocks.append(block)

    def uninstall(self) -> None:
        """Give the transformer back as it was."""
        self.reset()
        for block in self.blocks:
            release(block)
        release(self.transformer)

    # -- generations -----------------------------------------------------------------------------

    def context(self, name: str) -> "_Context":
        return _Context(self, name)

    def reset(self) -> None:
        """End the generation: forget all tensors, keep its trace for `summary`."""
        if self.generation is None:
            return
        for branch in self.generation.branches.values():
            if branch.correction_state is not None and branch.correction_state.unread:
                unread = branch.correction_state.unread
                self.correction.learn(branch.correction_state, self.scope.read(unread))
        self.generation.branches.clear()
        self.finished, self.generation = self.generation, None

    def summary(self) -> CacheSummary:
        """Summary of the running generation, or of the last one."""
        generation = self.generation or self.finished or Generation(Trace(self.config.name))
        return generation.summary()

    def _begin_generation(self) -> None:
        self.reset()
        self.generation = Generation(Trace(self.config.name))
        self.correction = self.literal
        if self.adaptive:
            self.correction = self._adaptive_correction()

    def _adaptive_correction(self) -> AdaCorrection:
        config, compensate = self.config, True
        if isinstance(self.clock, SchedulerClock):
            compensate = steps_by_euler(self.clock.scheduler)
            if not compensate:
                _warn_once(
                    f"{type(self.clock.scheduler).__name__}: AdaCorrection forecasts without "
                    f"compensation; it compensates for {', '.join(EULER_SCHEDULERS)}"
                )
        own_rule = config.use_cache == "Auto"
        default = self.family.tolerance if own_rule else self.family.safety_tolerance
        return AdaCorrection(
            gamma=config.adacorr_gamma,
            lambda_=config.adacorr_lambda,
            tolerance=config.adacorr_tolerance or default,
            compensate=compensate,
        )

    def _branch(self, latents: Tensor) -> Branch:
        """The state of this call's branch, new where none can be continued."""
        layout = layout_of(latents)
        branch = self.generation and self.generation.branches.get(self.context_name)
        changed = branch is not None and branch.layout != layout
        if self.clock.run_began() or self.generation is None or changed:
            self._begin_generation()
            branch = None
        return branch or self._new_branch(layout)

    def _new_branch(self, layout: tuple) -> Branch:
        correction_state = self.correction.new_state() if self.correction else None
        branch = Branch(self.context_name, layout, self.method.new_state(), correction_state)
        self.generation.branches[self.context_name] = branch
        return branch

    # -- one call --------------------------------------------------------------------------------

    def run_transformer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer one call of the transformer; an exception leaves no state behind."""
        arguments = bind_arguments(self.transformer, args, kwargs)
        latents, timestep = arguments[self.family.latents], arguments[self.family.timestep]
        try:
            call = self.active = ActiveCall(latents, timestep, self._branch(latents))
            if self.decides_outside:
                self._decide(call, None)
            if self.decides_outside and not call.record.refreshed:
                output = None
            else:
                output = original(*args, **kwargs)
            return self._finish(call, output, arguments.get("return_dict", True))
        except BaseException:
            if self.generation is not None:
                self.finished, self.generation = self.generation, None
                self.finished.branches.clear()
            raise
        finally:
            self.active = None

    def run_block(
        self,
        block: nn.Module,
        block_list: BlockList,
        index: int,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Answer one call of a block within a call of the transformer."""
        active = self.active
        if active is None:
            return original(*args, **kwargs)
        call = self._block_call(block, block_list, index, original, args, kwargs)
        if call.is_first:
            self._decide(active, call)
        state, record = active.branch.method_state, active.record
        if self.adaptive and not record.refreshed:
            out = call.streams  # the forecast replaces the output
        elif self.literal is not None:
            fresh = self.method.run_block(state, call, None) if record.refreshed else call.run()
            out = self.literal.blend_block(active.branch.correction_state, call, fresh, record)
        else:
            out = self.method.run_block(state, call, active.verdict)
        returned = tuple(out[name] for name in block_list.returns)
        return returned if len(returned) > 1 else returned[0]

    def _block_call(
        self,
        block: nn.Module,
        block_list: BlockList,
        index: int,
        original: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> BlockCall:
        arguments = bind_arguments(block, args, kwargs)
        streams = {name: arguments[name] for name in block_list.streams}
        once: list[Streams] = []

        def run(**overrides: Any) -> Streams:
            if once and not overrides:
                return once[0]
            result = self._execute(index, streams | overrides, original, arguments | overrides)
            result = result if isinstance(result, tuple) else (result,)
            out = dict(zip(block_list.returns, result, strict=True))
            if not overrides:
                once.append(out)
            return out

        return BlockCall(index, len(self.blocks), block, arguments, streams, run)

    def _execute(
        self,
        index: int,
        streams: Mapping[str, Any],
        original: Callable[..., Any],
        arguments: Mapping[str, Any],
    ) -> Any:
        """Run a block and count its FLOPs, measured when its input shapes are first seen."""
        shapes = tuple(tuple(x.shape) for x in streams.values() if isinstance(x, Tensor))
        key = (index, shapes)
        if key in self._block_flops:
            result = original(**arguments)
        else:
            result, self._block_flops[key] = count_flops(original, **arguments)
        self.active.flops += self._block_flops[key]
        return result

    def _decide(self, call: ActiveCall, block_call: BlockCall | None) -> None:
        """Read everything the decision needs at once, then refresh or reuse."""
        state = call.branch.method_state
        signal = self.method.probe(state, block_call) if block_call else Signal()
        history = call.branch.correction_state
        unread = history.unread if self.correction else []
        drift = self.correction.drift_sums(history, call.latents) if self.adaptive else []
        timestep = [call.timestep.flatten()[0]] if self.clock.needs_timestep else []
        sums = [*unread, *drift, *signal.sums]
        values = self.scope.read(sums, [*signal.local, *timestep])

        def take(count: int) -> list[float]:
            taken, values[:] = values[:count], values[count:]
            return taken

        found, drifted = take(len(unread)), take(len(drift))
        probed, local = take(len(signal.sums)), take(len(signal.local))
        call.step = self.clock.locate(call.branch.calls, *(values or [None]), call.branch.last_step)
        last = call.branch.last_step
        if found:
            self.correction.learn(history, found)
        if last is not None and not self.clock.continues(last, call.step):
            self._restart(call, block_call, *(values or [None]))
        verdict = None
        if call.branch.calls > 0:
            verdict = self.method.verdict(call.branch.method_state, probed, local)
            if drifted:
                call.score = self.correction.score(history, drifted, call.step)
        self._record(call, verdict)

    def _restart(
        self, call: ActiveCall, block_call: BlockCall | None, timestep: float | None
    ) -> None:
        """A new run began unannounced: nothing of the old one may be used."""
        self._begin_generation()
        call.branch = self._new_branch(call.branch.layout)
        call.step = self.clock.locate(0, timestep, None)
        if block_call is not None:
            self.method.probe(call.branch.method_state, block_call)

    def _record(self, call: ActiveCall, verdict: Verdict | None) -> None:
        step, branch, score = call.step, call.branch, call.score
        forced_last = AdaCorrection.forced_last_calls if self.adaptive else self.method.forces_last
        if branch.calls == 0:
            reason = "first"
        elif branch.calls < self.config.warmup_steps:
            reason = "warmup"
        elif step.remaining <= forced_last:
            reason = "last"
        elif not verdict.reuse:
            reason = "base"
        elif score is not None and score.weight >= 1.0:
            reason = "offset"
        else:
            reason = "reuse"
        record = CallRecord(branch.name, step.index, step.sigma, reason != "reuse", reason)
        if verdict is not None and not self.decides_outside:
            record.base_signal = verdict.signal
        if score is not None:
            record.weight = score.weight
            record.temporal, record.spatial = score.drift.temporal, score.drift.spatial
            record.expected_offset = score.expected_offset
        self.method.settle(branch.method_state, verdict, record.refreshed)
        call.record, call.verdict = record, None if record.refreshed else verdict
        self.generation.trace.calls.append(record)

    def _finish(self, call: ActiveCall, output: Any, return_dict: bool) -> Any:
        branch, record = call.branch, call.record
        if record is None:
            raise RuntimeError(
                "the transformer's blocks did not run through the cache; compile its blocks "
                "(compile_repeated_blocks), not the whole transformer, or use Auto"
            )
        if self.decides_outside:
            record.compute_fraction = float(record.refreshed)
        else:
            branch.full_flops = branch.full_flops or call.flops
            record.compute_fraction = call.flops / branch.full_flops if branch.full_flops else 1.0
        if self.adaptive:
            output = self._correct(call, output, return_dict)
        branch.calls += 1
        branch.last_step = call.step
        if call.record.refreshed:
            self.generation.measure_memory()
        return output

    def _correct(self, call: ActiveCall, output: Any, return_dict: bool) -> Any:
        """The forecast for a reused call; for a refreshed one its output, compensated."""
        history, step = call.branch.correction_state, call.step
        if not call.record.refreshed:
            sample = self.correction.reuse(history, step, call.score, call.latents.dtype)
            return self.family.make_output(sample, return_dict)
        fresh = output[0] if isinstance(output, tuple) else output.sample
        sample = self.correction.refresh(
            history, call.latents, fresh, step, call.score, call.record
        )
        return output if sample is fresh else self.family.make_output(sample, return_dict)


class _Context:
    """Names the branch of the calls made inside, as ``CacheMixin.cache_context`` does."""

    def __init__(self, engine: CacheEngine, name: str) -> None:
        self._engine, self._name = engine, name

    def __enter__(self) -> None:
        self._outer, self._engine.context_name = self._engine.context_name, self._name

    def __exit__(self, *error: Any) -> None:
        self._engine.context_name = self._outer


@lru_cache(maxsize=None)
def _warn_once(message: str) -> None:
    logger.warning(message)


def engine_of(transformer: nn.Module) -> CacheEngine:
    """The engine of an enabled transformer; `ValueError` if its cache is not enabled."""
    from .intercept import handler_of

    handler = handler_of(transformer)
    engine = getattr(handler, "__self__", None)
    if not isinstance(engine, CacheEngine):
        raise ValueError("no cache is enabled on this transformer; call enable_cache first")
    return engine
