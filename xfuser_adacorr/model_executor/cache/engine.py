"""Runs a transformer under a cache: one decision a call, then blocks run or are replaced."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import RankMismatchError

from .blocks import BlockRunner, bind_arguments, sample_of
from .context import Branch, layout_of
from .decision import ActiveCall, check_ranks, reason_for, record_of
from .diffusers_adapters.registry import ModelFamily, Streams
from .generations import Generations
from .intercept import InterceptedCall, handler_of, intercept, release
from .methods.base import BlockCall, Signal, Verdict
from .xfuser_adapters.pipefusion import Follower


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


class CacheEngine(Generations):
    """One enabled transformer: answers its calls by a decision for each."""

    def __init__(
        self, transformer: nn.Module, family: ModelFamily, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(transformer, family, *args, **kwargs)
        self.blocks = BlockRunner(transformer, family)
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
        return self._finish(call, output, arguments)

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

    def _finish(self, call: ActiveCall, output: Any, arguments: dict[str, Any]) -> Any:
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
        if record.refreshed and self.method.reads_output:
            self.method.note_output(branch.method_state, arguments, self._sample_in(output))
        if self.forecasts:
            fresh = self._sample_in(output) if record.refreshed else None
            sample = self._correct(call, fresh)
            if sample is not fresh:
                output = self.family.make_output(sample, arguments.get("return_dict", True))
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
