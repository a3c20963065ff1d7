"""What methods on modules share: their options, and the reuse of module outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from xfuser_adacorr.model_executor.cache.step import Step

from .base import Decision, Either, Read, Rule, StackMethod, StackRule
from .options import (
    CORRECTED_TOLERANCE,
    AdaCorrection,
    Method,
    check_count,
    error_rule,
    within_budget,
)

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.schedulers import Places
    from xfuser_adacorr.model_executor.cache.sites.modules import ModuleCall, Place

REFRESH_SHARE = 0.5
"""Share of the modules from which on a corrected method asks for a whole step."""


@dataclass(slots=True)
class ModuleState:
    """Of one branch of one run."""

    outputs: dict[Any, Any] = field(default_factory=dict)
    """By `ModuleCall.key`: what the module gave last, computed or not."""
    step: Step | None = None
    """The one that is sampled now."""
    notes: dict[Any, Any] = field(default_factory=dict)
    """What a method keeps beside them."""


class ModuleMethod(StackMethod):
    """Reuses the outputs of modules in the steps that `gates` says.

    ``bind`` is told the model, ``begin_run`` the run; both raise `ValueError` for what the method
    cannot act on.
    """

    forces_last = False
    works_on_ranks = True
    """Whether it decides and acts alike on all ranks that hold tokens of a sample."""
    places: Sequence["Place"] = ()

    def bind(self, model: nn.Module, places: Sequence["Place"]) -> None:
        self.places = places

    def new_state(self) -> ModuleState:
        return ModuleState()

    def measure(self, state: ModuleState, call: Any):
        from .base import Signal

        return Signal()

    def gates(self, state: ModuleState, step: Step, read: Read) -> Sequence[float]:
        """Of every module, the share of the samples that it is computed for in this step."""
        raise NotImplementedError

    def decide(self, state: ModuleState, step: Step, read: Read) -> Decision:
        gates = self.gates(state, step, read)
        compute = sum(gates) >= len(gates) * (REFRESH_SHARE if self.signal_only else 1.0)
        runs = tuple(share > 0 for share in gates)
        return Decision(compute, "base" if compute else "reuse", run_blocks=runs)

    def begin_call(self, state: ModuleState, step: Step) -> None:
        state.step = step

    def run_block(self, state: ModuleState, call: "ModuleCall", decision: Decision) -> Any:
        gates = decision.run_blocks
        runs = decision.compute or gates is None or gates[call.place.index]
        if runs or call.key not in state.outputs:
            out = self.computed(state, call)
        else:
            out = self.reused(state, call)
        return out

    def computed(self, state: ModuleState, call: "ModuleCall") -> Any:
        """What a module that is run gives; it is kept."""
        out = state.outputs[call.key] = call.run()
        return out

    def reused(self, state: ModuleState, call: "ModuleCall") -> Any:
        """What stands in for a module that is not."""
        return state.outputs[call.key]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleOptions(Method):
    """Options of the methods on modules.

    With AdaCorrection a step is computed whole, where the method would run at least half of the
    modules or the expected error asks for it, and skipped otherwise: no module's output is reused.
    """

    inside_corrected: ClassVar[bool] = False
    """Whether the method acts on modules under AdaCorrection too."""

    num_steps: int | None = None
    """Sampling steps of a bare model."""
    correction: AdaCorrection | None = None
    """AdaCorrection(...): steps are skipped, extrapolated and repaired."""

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, least=1, optional=True)
        if not isinstance(self.correction, (AdaCorrection, type(None))):
            raise TypeError(
                f"correction must be AdaCorrection(...) or None, got {self.correction!r}"
            )

    @property
    def needs_blocks(self) -> bool:
        return self.correction is None or self.inside_corrected

    @property
    def answers_steps(self) -> bool:
        return self.correction is not None

    @property
    def needs_steps(self) -> bool:
        return True

    def check_models(self, models: Mapping[str, nn.Module]) -> None:
        """Raise `ValueError` for a model without such modules, corrected or not."""
        from xfuser_adacorr.model_executor.cache.sites.modules import find_modules

        for model in models.values():
            find_modules(model)

    def make_modules(self) -> ModuleMethod:
        """The method on the modules of one model."""
        raise NotImplementedError

    def make_stack(self, model: nn.Module, family: Any = None) -> ModuleMethod:
        method = self.make_modules()
        method.signal_only = self.correction is not None
        return method

    def make_rule(self, places: "Places | None", inside: Mapping[str, Rule]) -> Rule:
        own = error_rule(self.correction, CORRECTED_TOLERANCE, places)
        base = next(iter(inside.values())) if inside else StackRule(self.make_stack(None))
        base.method.begin_run(places)
        return within_budget(Either(base, own), own)
