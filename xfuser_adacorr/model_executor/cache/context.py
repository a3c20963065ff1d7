"""State of one generation, its branches, and the record of every decision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clock import Step

TRACE_SCHEMA = 3
"""1 had no ``config``, so that its decisions can be read but not replayed; 2 had no ``sample``."""


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
    """``first``, ``warmup``, ``last`` (forced), ``base``, ``offset`` (w = 1), ``budget`` (that
    of a target is just enough for all calls left), ``branch`` (another branch of the step was
    computed), ``patches`` (PipeFusion splits the latents next), ``stage`` (the first pipeline stage
    refreshed), or ``reuse``."""
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
    expected_error: float | None = None
    """Expected error of the latents, relative to them, added up since the last refresh."""
    tolerance: float | None = None
    """What the expected error was compared with; steered from call to call by a target."""
    run_blocks: tuple[bool, ...] | None = None
    """Per-block methods: the blocks executed; None: all or none."""
    kept_tokens: int | None = None
    """Fast with static tokens: the tokens sent through the blocks; None: all or none."""
    sample: int | None = None
    """Index in the batch where samples are decided one by one; None: decided for all of it."""


@dataclass(slots=True)
class Trace:
    """All decisions of a generation, in the order of the calls."""

    method: str
    calls: list[CallRecord] = field(default_factory=list)
    config: dict[str, Any] | None = None
    """Options of the cache that was traced (`CacheConfig.to_dict`); None in traces of schema 1."""

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
            return cls(str(content["method"]), calls, content.get("config"))
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


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What a generation cost and kept."""

    method: str
    num_steps: int
    """Sampling steps seen."""
    computed_steps: int
    """Transformer calls computed in full (over all branches, and over samples that are decided one
    by one)."""
    reused_steps: int
    """Transformer calls answered, at least partly, from the cache; counted alike."""
    compute_fraction: float
    """FLOPs of the executed blocks over FLOPs of all blocks; 1 before the first call. Of samples
    that are decided one by one: rows computed over all rows."""
    cache_memory_bytes: int
    """Most bytes of tensors that the cache held at once, over all branches."""
    trace: Trace
    expected_psnr_db: float | None = None
    """PSNR against the uncached picture that the measured offsets let expect; None without a target
    or without a calibration of the model."""

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.compute_fraction

    @property
    def compute_by_sample(self) -> dict[int, float]:
        """Compute fraction of each sample; empty if they were decided together."""
        fractions: dict[int, list[float]] = {}
        for call in self.trace.calls:
            if call.sample is not None:
                fractions.setdefault(call.sample, []).append(call.compute_fraction)
        return {sample: sum(own) / len(own) for sample, own in fractions.items()}


@dataclass(slots=True)
class Branch:
    """One branch (``cond``, ``uncond``) of one generation, or of one sample of it."""

    name: str
    layout: tuple
    """Shape, dtype and device of the latents of the whole batch; another layout is another
    generation."""
    method_state: Any
    correction: Any
    """What corrects it, None without; all branches of a sample share one."""
    correction_state: Any
    sample: int | None = None
    """`CallRecord.sample`."""
    calls: int = 0
    last_step: Step | None = None
    full_flops: int = 0
    output_dtype: torch.dtype | None = None
    """Of the transformer's output, as the last refresh found it."""


@dataclass(slots=True)
class Generation:
    """Everything that is forgotten when the next generation begins."""

    trace: Trace
    branches: dict[tuple[str, int | None], Branch] = field(default_factory=dict)
    """By name and sample."""
    passed_on: dict[str, Tensor] = field(default_factory=dict)
    """Pipeline stages: the streams beside the output stream, as last computed."""
    peak_bytes: int = 0
    expected_psnr_db: float | None = None

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
            self.expected_psnr_db,
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
