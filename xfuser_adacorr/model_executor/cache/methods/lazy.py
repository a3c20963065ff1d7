"""LazyDiT: linear probes on the modules' inputs say which are computed, sample by sample."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .base import Decision, Signal
from .modular import ModuleMethod, ModuleOptions, ModuleState
from .options import check_number

PROBE_FILE = "lazy.safetensors"
ROWS = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask", "text", "key_mask")
"""Arguments of modules, beside the tokens, that have one row a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lazy(ModuleOptions):
    """Reuse module m in step t, for a sample, iff ``sigmoid(sum_tokens Z . w[t, m]) > laziness``.

    Z is the module's modulated input (arXiv 2412.12444) in the step before, so that all probes of a
    step are read at once. Raises as `L2C` does.
    """

    label: ClassVar[str] = "Lazy"
    inside_corrected: ClassVar[bool] = True

    probes: str | None = None
    """File of the trained probes; None: ``lazy.safetensors`` beside the model."""
    laziness: float = 0.5
    """Above which a module is reused, in [0, 1]; 1: never."""
    loaded: Any = field(default=None, repr=False, compare=False)
    """The `ModuleTable` that was read."""

    def __post_init__(self) -> None:
        ModuleOptions.__post_init__(self)
        check_number("laziness", self.laziness, least=0, most=1)

    def bound_to(self, model: Any) -> "Lazy":
        from xfuser_adacorr.model_executor.cache.calibration.module_file import load_table

        return replace(self, loaded=load_table(model, self.probes, PROBE_FILE, "Lazy"))

    def make_modules(self) -> "Probed":
        return Probed(self.loaded, self.laziness)


class Probed(ModuleMethod):
    """Decides by probes of inputs that were seen in the step before; untrained ones compute."""

    works_on_ranks = False

    def __init__(self, table: Any, laziness: float) -> None:
        self.table = table
        self.limit = math.inf if laziness == 1 else -math.inf
        if 0 < laziness < 1:
            self.limit = math.log(laziness / (1 - laziness))
        count, steps = len(table.modules), table.num_steps
        self.weights = [
            [table.tensors[str(module)][step].float() for module in range(count)]
            for step in range(steps)
        ]

    def bind(self, model, places) -> None:
        self.table.check_modules([place.name for place in places])
        ModuleMethod.bind(self, model, places)

    def begin_run(self, places) -> None:
        self.table.check(places)

    def measure(self, state: ModuleState, call: Any) -> Signal:
        logits: dict[int, Tensor] = state.notes.get("logits", {})
        if not logits:
            return Signal()
        state.notes["samples"] = samples = min(len(rows) for rows in logits.values())
        packed = torch.stack(
            [logits[place.index].view(samples, -1).sum(1) for place in self.places]
        )
        return Signal(local=list(packed.flatten()))

    def gates(self, state: ModuleState, step, read) -> list[float]:
        if not read.local:
            return [1.0] * len(self.places)
        if state.notes["for"] != step.index:  # corrected: steps were skipped since
            return [0.0] * len(self.places)
        samples = state.notes["samples"]
        lazy = [logit > self.limit for logit in read.local]
        state.notes["lazy"] = [lazy[i : i + samples] for i in range(0, len(lazy), samples)]
        return [1.0 - sum(rows) / samples for rows in state.notes["lazy"]]

    def run_block(self, state: ModuleState, call, decision: Decision) -> Any:
        index, after = call.place.index, state.step.index + 1
        if after < len(self.weights):
            probe = self.weights[after][index].to(call.hidden.device)
            state.notes.setdefault("logits", {})[index] = token_sums(call.hidden) @ probe
            state.notes["for"] = after
        lazy = state.notes.get("lazy")
        if decision.compute or lazy is None or call.key not in state.outputs:
            return self.computed(state, call)
        if all(lazy[index]):
            return state.outputs[call.key]
        if not any(lazy[index]):
            return self.computed(state, call)
        return self._some_samples(state, call, lazy[index])

    def _some_samples(self, state: ModuleState, call, lazy: list[bool]) -> Any:
        """Compute the rows of the samples that are not lazy; keep the others' last ones."""
        count = call.hidden.shape[0]
        each = count // len(lazy)
        busy = [row for row in range(count) if not lazy[row // each]]
        rows = torch.tensor(busy, device=call.hidden.device)
        names = [
            n
            for n in (call.hidden_name, *ROWS)
            if isinstance(call.arguments.get(n), Tensor) and call.arguments[n].shape[0] == count
        ]
        fresh = call.run(**{name: call.arguments[name][rows] for name in names})
        old = state.outputs[call.key]
        out = pytree.tree_map(lambda f, o: o.index_copy(0, rows, f.to(o.dtype)), fresh, old)
        state.outputs[call.key] = out
        return out


def token_sums(hidden: Tensor) -> Tensor:
    """Over all but the first and the last dimension, float32 ``[rows, D]``."""
    return hidden.float().flatten(1, -2).sum(1) if hidden.ndim > 2 else hidden.float()
