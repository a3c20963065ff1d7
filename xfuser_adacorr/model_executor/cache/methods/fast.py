"""FastCache: a per-block test on the block's input; static tokens may bypass the blocks."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.signals import l2_sums, ratio

from .base import BlockCall, Decision, Read, Signal, StackMethod, Streams
from .options import StackOptions, check_flag, check_number

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily

STACK = "stack"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fast(StackOptions):
    """Replace each block whose input changed by at most ``threshold``."""

    label: ClassVar[str] = "Fast"

    static_tokens: bool = False
    """Static tokens bypass the blocks through one map of the whole stack."""
    motion_threshold: float = 0.1
    """With ``static_tokens``: saliency over the largest, in [0, 1], up to which a token is
    static."""
    calibration: str | None = None
    """File with fitted maps; None: the one beside the model, else residuals."""

    def __post_init__(self) -> None:
        StackOptions.__post_init__(self)
        check_flag("static_tokens", self.static_tokens)
        check_number("motion_threshold", self.motion_threshold, least=0, most=1)
        if self.motion_threshold != 0.1 and not self.static_tokens:
            raise ValueError(
                "motion_threshold is for static_tokens=True, which finds the static tokens with it"
            )

    def stack_method(self, model, family) -> "PerBlockTest":
        from xfuser_adacorr.model_executor.cache.calibration.fast import load_fast_maps

        if self.static_tokens and family.select_tokens is None:
            raise ValueError(
                f"static_tokens must be False for {type(model).__name__} (family "
                f"{family.name!r}): its blocks need all tokens"
            )
        return PerBlockTest(
            self.threshold_for(family),
            family,
            load_fast_maps(model, self.calibration),
            self.static_tokens and self.correction is None,
            self.motion_threshold,
        )


def packed_tests(sums: list[Tensor], threshold: float, max_sums: int) -> list[Tensor]:
    """Pairs ``||H - H_ref||^2, ||H_ref||^2`` of the blocks -> at most ``max_sums`` sums.

    First one ``||H - H_ref||^2 - threshold^2 ||H_ref||^2`` a test, whose sign over all ranks is the
    outcome; beyond ``max_sums - 2`` blocks, ones that follow each other are tested together. Last
    the two sums over all blocks, for the trace.
    """
    differences, references = torch.stack(sums[::2]), torch.stack(sums[1::2])
    margins = differences - threshold**2 * references
    together = blocks_a_test(len(margins), max_sums)
    tests = [part.sum() for part in margins.split(together)]
    return [*tests, differences.sum(), references.sum()]


def unpacked_tests(sums: list[float], count: int, max_sums: int) -> tuple[float, tuple[bool, ...]]:
    """(mean relative change, whether each of ``count`` blocks runs) from `packed_tests`' sums."""
    *margins, difference, reference = sums
    together = blocks_a_test(count, max_sums)
    run_blocks = tuple(margins[index // together] > 0.0 for index in range(count))
    return math.sqrt(ratio(difference, reference)), run_blocks


def blocks_a_test(count: int, max_sums: int) -> int:
    return math.ceil(count / (max_sums - 2))


@dataclass(slots=True)
class FastState:
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Each block's input at its own last execution ``[B, N, D]``."""
    residuals: dict[int, Streams] = field(default_factory=dict)
    """Each block's residuals at that execution; not kept where a fitted map stands in."""
    stack_residual: Tensor | None = None
    """Static tokens: residual of the whole stack at the last full call ``[B, N, D]``."""
    predicted: list[Streams] = field(default_factory=list)
    """Streams before each block, and after the last, if all blocks were reused."""
    stack_input: Tensor | None = None
    moving: Tensor | None = None
    """Static tokens: indices of the moving tokens of this call ``[K]``."""
    executed: bool = False
    """A block of this call has been executed, so ``predicted`` holds no more."""


class PerBlockTest(StackMethod):
    """Replace block l iff ``||H - H_ref|| / ||H_ref|| <= threshold`` on its input H.

    ``H_ref`` is the input of the block's own last execution. The stand-in is the fitted linear map
    ``h + W_l h + b_l`` if one was calibrated, else ``h + R_l`` with the block's last residual. All
    tests are read at once: H is predicted by the stand-ins of the blocks before it, which is exact
    until the first block runs. The first and the last call are computed. Where ranks share a
    sample, stacks of more than 14 blocks test neighbours together (`packed_tests`).

    With ``static_tokens``, tokens whose squared change since the last full call is at most
    ``motion_threshold`` of the largest one (over the batch) bypass the blocks through the stack's
    map ``h + W_c h + b_c`` or its last residual; blocks see the moving tokens and all text tokens.

    Source: FastCache (arXiv 2505.20353); its chi-square test is equivalent to a threshold near 1
    and its code reduces to the threshold 0.05 used here.
    """

    def __init__(
        self,
        threshold: float,
        family: "ModelFamily",
        maps: dict[str, Tensor],
        static_tokens: bool,
        motion_threshold: float,
    ) -> None:
        self.threshold, self.family, self.maps = threshold, family, maps
        self.static_tokens, self.motion_threshold = static_tokens, motion_threshold

    def new_state(self) -> FastState:
        return FastState()

    def _mapped(self, x: Tensor, unit: str, stream: str) -> Tensor | None:
        """``x + W x + b`` through a fitted map, or None if there is none for this unit."""
        if f"{unit}.{stream}.weight" not in self.maps:
            return None
        weight = self.maps[f"{unit}.{stream}.weight"].to(x.device, x.dtype)
        bias = self.maps[f"{unit}.{stream}.bias"].to(x.device, x.dtype)
        return x + nn.functional.linear(x, weight, bias)

    def _stand_in(self, state: FastState, index: int, streams: Streams) -> Streams:
        out = {}
        for name, x in streams.items():
            mapped = self._mapped(x, f"blocks.{index}", name)
            if mapped is None:
                residual = state.residuals[index][name]
                if state.moving is not None and name == self.family.output_stream:
                    residual = residual[:, state.moving]
                mapped = x + residual
            out[name] = mapped
        return out

    def measure(self, state: FastState, call: BlockCall) -> Signal:
        stream = self.family.output_stream
        state.moving, state.executed, state.predicted = None, False, []
        if not state.inputs:
            return Signal()
        if self.signal_only:
            return Signal(l2_sums(call.streams[stream], state.inputs[0]))
        sums, local, streams = [], [], call.streams
        for index in range(call.count):
            state.predicted.append(streams)
            sums += l2_sums(streams[stream], state.inputs[index])
            streams = self._stand_in(state, index, streams)
        state.predicted.append(streams)
        if self.static_tokens:
            moved = call.streams[stream].float() - state.inputs[0].float()
            motion = moved.square().sum(-1).amax(0)
            state.moving = motion.argsort(descending=True)
            local.append((motion > self.motion_threshold * motion.max()).sum())
        if self.max_sums is not None:
            sums = packed_tests(sums, self.threshold, self.max_sums)
        return Signal(sums, local=local)

    def decide(self, state: FastState, step, read: Read) -> Decision:
        sums, local = read.inside, read.local
        if self.max_sums is not None and not self.signal_only:
            change, run_blocks = unpacked_tests(sums, len(state.inputs), self.max_sums)
        else:
            changes = [math.sqrt(ratio(*pair)) for pair in zip(sums[::2], sums[1::2], strict=True)]
            change, run_blocks = max(changes), tuple(not c <= self.threshold for c in changes)
        kept = max(int(local[0]), 1) if local and math.isfinite(change) else None
        reuse = not all(run_blocks) or kept is not None
        decision = Decision(
            not reuse,
            "reuse" if reuse else "base",
            base_signal=change,
            run_blocks=run_blocks,
            kept_tokens=kept,
        )
        self.follow(state, decision)
        return decision

    def follow(self, state: FastState, decision: Decision) -> None:
        if decision.kept_tokens is not None:
            state.moving = state.moving[: decision.kept_tokens]

    def after_call(self, state: FastState, step, decision: Decision) -> None:
        if decision.compute:
            state.moving, state.predicted = None, []

    def run_block(self, state: FastState, call: BlockCall, decision: Decision) -> Streams:
        if call.is_first:
            state.stack_input = call.streams[self.family.output_stream]
        execute = decision.compute or decision.run_blocks[call.index]
        # What a model adds between its blocks (ControlNet, VACE) was not predicted.
        predicted = state.predicted[call.index] if state.predicted else {}
        as_predicted = all(x is predicted.get(name) for name, x in call.streams.items())
        if not execute and not state.executed and state.moving is None and as_predicted:
            out = state.predicted[call.index + 1]
        else:
            out = self._run_tokens(state, call, execute)
        if call.is_last:
            out = self._finish(state, out, refreshed=decision.compute)
        return out

    def _run_tokens(self, state: FastState, call: BlockCall, execute: bool) -> Streams:
        """Run or replace the block, on the moving tokens alone where there are static ones."""
        stream, streams, overrides = self.family.output_stream, call.streams, {}
        if state.moving is not None:
            arguments = call.arguments
            if not call.is_first:  # the stream is already cut down to the moving tokens
                arguments = {**arguments, stream: state.stack_input}
            overrides = self.family.select_tokens(arguments, state.moving)
            if not call.is_first:
                overrides[stream] = streams[stream]
            streams = {**streams, stream: overrides[stream]}
        if not execute:
            return self._stand_in(state, call.index, streams)
        state.executed = True
        out = call.run(**overrides)
        if not self.signal_only or call.is_first:
            self._store(state, call.index, streams, out)
        return out

    def _store(self, state: FastState, index: int, streams: Streams, out: Streams) -> None:
        stream = self.family.output_stream
        if state.moving is None:
            state.inputs[index] = streams[stream].clone()
        else:
            state.inputs[index][:, state.moving] = streams[stream]
        if self.signal_only:
            return
        kept = state.residuals.setdefault(index, {})
        for name, x in streams.items():
            if f"blocks.{index}.{name}.weight" in self.maps:
                continue
            if state.moving is not None and name == stream:
                kept[name][:, state.moving] = out[name] - x
            else:
                kept[name] = out[name] - x

    def _finish(self, state: FastState, out: Streams, refreshed: bool) -> Streams:
        """Put static tokens back beside the moving ones, and drop what only this call needed."""
        stream = self.family.output_stream
        if state.moving is not None:
            whole = self._mapped(state.stack_input, STACK, stream)
            if whole is None:
                whole = state.stack_input + state.stack_residual
            whole = torch.index_copy(whole, 1, state.moving, out[stream])
            out = {**out, stream: whole}
        elif refreshed and self.static_tokens:
            state.stack_residual = out[stream] - state.stack_input
        state.stack_input, state.moving, state.predicted = None, None, []
        return out
