"""What was decided in a run, and why: records, their file, and the summary."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .messages import warn_once
from .methods.base import Decision
from .step import Step

TRACE_SCHEMA = 4
"""1 had no ``config``, so that its decisions can be read but not replayed; 2 had no ``sample``;
3 had a record for every call of corrected methods, where 4 has one for a step."""
STEP_CONTEXT = "step"
"""`CallRecord.context` of a decision for all calls of a sampling step."""


@dataclass(slots=True)
class CallRecord:
    """What was decided about a sampling step, or about one call of a model, and why."""

    context: str
    """``step``, or of a call the denoiser and its branch."""
    step_index: int
    sigma: float
    refreshed: bool
    """True if everything was computed."""
    reason: str
    """``first``, ``warmup``, ``last`` (forced), ``base`` (the method asked for it), ``offset`` (w =
    1), ``budget`` (just enough for all steps left), ``inputs`` (the model is called with other
    conditioning), ``stage`` (the second call of a Heun-like step follows the first; or the first
    pipeline stage refreshed), ``patches`` (PipeFusion splits the latents next), ``autograd``
    (gradients are recorded), or ``reuse``."""
    weight: float | None = None
    """Correction weight w in [0, 1]."""
    temporal: float | None = None
    spatial: float | None = None
    base_signal: float | None = None
    """What the base method compared with its threshold."""
    expected_offset: float | None = None
    """Relative error of the forecast that the offset estimation expected."""
    found_offset: float | None = None
    """Relative error of the forecast that the refresh found."""
    compute_fraction: float = 1.0
    """Calls, or where blocks are skipped within them blocks, that were executed over all."""
    calls: int = 1
    """Denoiser calls that the record is about."""
    computed_calls: int = 1
    """Those of them that were computed in full."""
    expected_error: float | None = None
    """Expected error of the latents, relative to them, added up since the last refresh."""
    tolerance: float | None = None
    """What the expected error was compared with; steered from call to call by a target."""
    run_blocks: tuple[bool, ...] | None = None
    """Per-block methods: the blocks executed; None: all or none."""
    kept_tokens: int | None = None
    """Fast with static tokens: the tokens sent through the blocks; None: all or none."""
    modules: int | None = None
    """Methods on modules: attention and feed-forward modules that the call had."""
    modules_run: int | None = None
    """Those of them that ran, for some of their tokens or samples at least."""
    module_flops: float | None = None
    """FLOPs of their linear layers and attention."""
    sample: int | None = None
    """Index in the batch where samples are decided one by one; None: decided for all of it."""


@dataclass(slots=True)
class Trace:
    """All decisions of a generation, in the order of the calls."""

    method: str
    calls: list[CallRecord] = field(default_factory=list)
    config: dict[str, Any] | None = None
    """Options of the cache that was traced (`CacheConfig.to_dict`); None in traces of schema 1."""
    plan: Mapping[str, Any] | None = None
    """Name and expected PSNR of the learned plan that was followed (fields of `CacheSummary`)."""

    def to_dict(self) -> dict[str, Any]:
        return {"schema": TRACE_SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Trace":
        """The inverse of `to_dict`; `ValueError` for anything else."""
        if not isinstance(content, Mapping) or "schema" not in content:
            raise ValueError("trace: not a trace of a cache, it has no schema")
        if content["schema"] not in range(1, TRACE_SCHEMA + 1):
            raise ValueError(
                f"trace: schema must be at most {TRACE_SCHEMA}, got {content['schema']!r}; "
                "it was written by a newer version"
            )
        try:
            calls = [CallRecord(**_with_tuples(call)) for call in content["calls"]]
            return cls(str(content["method"]), calls, content.get("config"), content.get("plan"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"trace: not a trace of a cache ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote; `FileNotFoundError`, or `ValueError` if it is something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"trace: no file {path}")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:  # of JSON and of Unicode too
            raise ValueError(f"{path}: {error}") from error


def _with_tuples(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's fields with what JSON made of a tuple turned back."""
    blocks = call.get("run_blocks")
    return {**call, "run_blocks": None if blocks is None else tuple(blocks)}


def new_trace(method: Any) -> Trace:
    """The empty trace of a run under ``method``."""
    return Trace(method.name, config=method.to_dict())


def record_of(context: str, step: Step, decision: Decision) -> CallRecord:
    """What the trace says of a decision."""
    record = CallRecord(context, step.index, step.sigma, decision.compute, decision.why)
    record.weight, record.base_signal = decision.weight, decision.base_signal
    record.temporal, record.spatial = decision.temporal, decision.spatial
    record.expected_offset = decision.expected_offset
    record.expected_error, record.tolerance = decision.expected_error, decision.tolerance
    if not decision.compute:
        record.run_blocks, record.kept_tokens = decision.run_blocks, decision.kept_tokens
    return record


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What a run cost and kept."""

    method: str
    num_steps: int
    """Sampling steps seen."""
    computed_steps: int
    """Steps all of whose calls were computed in full."""
    reused_steps: int
    """Steps answered, at least partly, from the cache."""
    calls: int
    """Calls that the pipeline made of all its denoisers."""
    computed_calls: int
    """Those of them that were computed in full."""
    compute_fraction: float
    """Calls (where blocks are skipped within them, blocks) executed over all; 1 before a call."""
    cache_memory_bytes: int
    """Most bytes of tensors that the cache held at once."""
    trace: Trace = field(repr=False)
    plan: str | None = None
    """Name of the learned plan that was followed."""
    expected_psnr_db: float | None = None
    """Mean PSNR that the plan had on the prompts it was fitted on."""

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.compute_fraction

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.computed_steps} of {self.num_steps} steps computed, "
            f"{self.computed_calls} of {self.calls} calls",
            f"compute fraction {self.compute_fraction:.3f}, "
            f"cache memory {self.cache_memory_bytes / 2**20:.2f} MiB",
        ]
        if self.plan is not None:
            expected = self.expected_psnr_db
            known = "PSNR not known" if expected is None else f"expected {expected:.1f} dB"
            lines.append(f"plan {self.plan}, {known}")
        return "\n".join(lines)


def summary_of(trace: Trace, memory_bytes: int = 0) -> CacheSummary:
    """Count a trace's records."""
    records = trace.calls
    steps: dict[int, list[CallRecord]] = {}
    for record in records:
        steps.setdefault(record.step_index, []).append(record)
    calls = sum(record.calls for record in records)
    executed = sum(record.compute_fraction * record.calls for record in records)
    computed = sum(all(r.refreshed for r in group) for group in steps.values())
    return CacheSummary(
        method=trace.method,
        num_steps=len(steps),
        computed_steps=computed,
        reused_steps=len(steps) - computed,
        calls=calls,
        computed_calls=sum(record.computed_calls for record in records),
        compute_fraction=executed / calls if calls else 1.0,
        cache_memory_bytes=memory_bytes,
        trace=trace,
        **(trace.plan or {}),
    )


IDLE_HINTS = {
    "base": "its signal never stayed below the threshold; raise rel_l1_thresh",
    "offset": "the expected error always reached the tolerance; raise the tolerance",
    "warmup": "warmup_steps covers them",
    "inputs": "the denoisers are called with other conditioning in every step; where that is so by "
    "design, give a bare model its scheduler",
    "autograd": "gradients are recorded; sample under torch.no_grad()",
    "budget": "the budget covers them",
    "first": "each was taken for the first of a run; call set_timesteps once a run",
}
IDLE_STEPS = 4
"""Shorter runs may well have nothing to reuse."""


def warn_if_idle(trace: Trace) -> None:
    """Warn, once a process, of a run in which the cache could have acted and never did."""
    reasons = [record.reason for record in trace.calls]
    if len(reasons) < IDLE_STEPS or any(not record.refreshed for record in trace.calls):
        return
    most = max(sorted(set(reasons)), key=reasons.count)
    if (trace.config or {}).get("schedule") != 1 and most in IDLE_HINTS:
        warn_once(f"{trace.method} computed every step of a run ({most}): {IDLE_HINTS[most]}")


def tensor_bytes(state: Any) -> int:
    """Bytes of all distinct tensor storages in a tree of lists, tuples, dicts and dataclasses."""
    storages: dict[tuple, int] = {}

    def visit(leaf: Any) -> None:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages[leaf.device, storage.data_ptr()] = storage.nbytes()
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            pytree.tree_map_(visit, [getattr(leaf, f.name) for f in fields(leaf)])
        elif hasattr(leaf, "__dict__") and isinstance(leaf, Mapping):
            pytree.tree_map_(visit, dict(leaf))

    pytree.tree_map_(visit, state)
    return sum(storages.values())
