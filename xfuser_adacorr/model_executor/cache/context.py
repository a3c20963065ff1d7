"""State of one generation, its branches, and the record of every decision."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clock import Step


@dataclass(slots=True)
class CallRecord:
    """What was decided about one transformer call, and why."""

    context: str
    """Branch: ``cond``, ``uncond``, or the default context."""
    step_index: int
    sigma: float
    refreshed: bool
    """True if every block was computed."""
    reason: str
    """``first``, ``warmup``, ``last`` (forced), ``base``, ``offset`` (w = 1), ``branch`` (another
    branch of the step was computed, and the sampler is replayed), ``patches`` (PipeFusion splits
    the latents next), ``stage`` (the first pipeline stage refreshed), or ``reuse``."""
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
    """FLOPs of the executed blocks over FLOPs of all blocks."""


@dataclass(slots=True)
class Trace:
    """All decisions of a generation, in the order of the calls."""

    method: str
    calls: list[CallRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What a generation cost and kept."""

    method: str
    num_steps: int
    """Sampling steps seen."""
    computed_steps: int
    """Transformer calls computed in full (over all branches)."""
    reused_steps: int
    """Transformer calls answered, at least partly, from the cache."""
    compute_fraction: float
    """FLOPs of the executed blocks over FLOPs of all blocks; 1 before the first call."""
    cache_memory_bytes: int
    """Most bytes of tensors that the cache held at once, over all branches."""
    trace: Trace

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.compute_fraction


@dataclass(slots=True)
class Branch:
    """One branch (``cond``, ``uncond``) of one generation."""

    name: str
    layout: tuple
    """Shape, dtype and device of the latents; another layout is another generation."""
    method_state: Any
    correction_state: Any
    calls: int = 0
    last_step: Step | None = None
    full_flops: int = 0
    output_dtype: torch.dtype | None = None
    """Of the transformer's output, as the last refresh found it."""


@dataclass(slots=True)
class Generation:
    """Everything that is forgotten when the next generation begins."""

    trace: Trace
    branches: dict[str, Branch] = field(default_factory=dict)
    passed_on: dict[str, Tensor] = field(default_factory=dict)
    """Pipeline stages: the streams beside the output stream, as last computed."""
    peak_bytes: int = 0

    def forget(self) -> None:
        """Let go of all tensors; the trace stays."""
        self.branches.clear()
        self.passed_on = {}

    def measure_memory(self, shared: Sequence[Tensor] = ()) -> None:
        """Note what is held now; ``shared`` belongs to no branch."""
        branches = [(b.method_state, b.correction_state) for b in self.branches.values()]
        held = tensor_bytes([branches, self.passed_on, list(shared)])
        self.peak_bytes = max(self.peak_bytes, held)

    def summary(self) -> CacheSummary:
        calls = self.trace.calls
        computed = sum(call.refreshed for call in calls)
        fraction = sum(call.compute_fraction for call in calls) / len(calls) if calls else 1.0
        steps = len({call.step_index for call in calls})
        return CacheSummary(
            self.trace.method,
            steps,
            computed,
            len(calls) - computed,
            fraction,
            self.peak_bytes,
            self.trace,
        )


def layout_of(latents: Tensor) -> tuple:
    return tuple(latents.shape), latents.dtype, latents.device


def tensor_bytes(state: Any) -> int:
    """Bytes of all distinct tensor storages in a tree of dataclasses, dicts, lists and tuples."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif is_dataclass(node):
            for f in fields(node):
                visit(getattr(node, f.name))
        elif isinstance(node, dict):
            for value in node.values():
                visit(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                visit(value)

    visit(state)
    return sum(storages.values())
