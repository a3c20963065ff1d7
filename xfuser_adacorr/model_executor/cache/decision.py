"""One transformer call while it runs, why it is refreshed or reused, and the record of that."""

import zlib
from dataclasses import dataclass

from torch import Tensor

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.core.distributed import DecisionScope

from .clock import Step
from .context import Branch, CallRecord
from .correction.adacorrection import AdaCorrection, Score
from .methods.base import BaseMethod, Verdict


@dataclass(slots=True)
class ActiveCall:
    """One transformer call while it runs, or one sample's part of it."""

    latents: Tensor
    """As tokens ``[B, N, C]``."""
    given: Tensor
    """The latents as the transformer is given them."""
    timestep: Tensor
    branch: Branch
    step: Step | None = None
    record: CallRecord | None = None
    verdict: Verdict | None = None
    """The base method's decision if the call is reused, else None."""
    score: Score | None = None


def reason_for(
    call: ActiveCall,
    verdict: Verdict | None,
    config: CacheConfig,
    method: BaseMethod,
    correction: AdaCorrection | None,
) -> str:
    """Why the call is refreshed, or ``reuse`` (`CallRecord.reason`).

    ``verdict`` is that of the base ``method``, None on a branch's first call. The method's rule for
    the last call is replaced by that of an adaptive ``correction``, and a correction's target may
    settle what is not forced.
    """
    forced_last = int(method.forces_last)
    if correction is not None:
        forced_last = correction.forced_last(call.step, call.score)
    if call.branch.calls == 0:
        return "first"
    if method.decides_alone:
        return "reuse" if verdict.reuse else "base"
    if call.branch.calls < config.warmup_steps:
        return "warmup"
    if call.step.remaining <= forced_last:
        return "last"
    if correction is not None:
        ruling = correction.ruling(call.branch.correction_state, call.step, forced_last)
        if ruling is not None:
            return ruling
    if not verdict.reuse and (correction is None or correction.grants(call.score)):
        return "base"
    if call.score is not None and call.score.weight >= 1.0:
        return "offset"
    forced = correction.forced(call.step) if correction is not None else None
    return forced or "reuse"


def record_of(call: ActiveCall, verdict: Verdict | None, reason: str) -> CallRecord:
    """What the trace says of a call that is decided."""
    branch, step, score, refreshed = call.branch, call.step, call.score, reason != "reuse"
    record = CallRecord(
        branch.name, step.index, step.sigma, refreshed, reason, sample=branch.sample
    )
    if verdict is not None:
        record.base_signal = verdict.signal
        if not refreshed:
            record.run_blocks, record.kept_tokens = verdict.run_blocks, verdict.kept_tokens
    if score is not None:
        record.weight = score.weight
        record.temporal, record.spatial = score.drift.temporal, score.drift.spatial
        record.expected_offset = score.expected_offset
        record.expected_error, record.tolerance = score.accumulated_error, score.tolerance
    return record


def check_ranks(scope: DecisionScope, call: ActiveCall, verdict: Verdict | None) -> None:
    """Raise on all ranks if one decided differently, before anything can hang."""
    if not scope.check_ranks:
        return
    record, blocks = call.record, verdict.run_blocks if verdict is not None else None
    decision = (call.branch.calls, record.step_index, record.reason, blocks)
    scope.check(
        record.step_index,
        record.refreshed,
        zlib.crc32(repr(decision).encode()),
        (record.base_signal, record.weight, record.temporal),
        call.latents.device,
    )
