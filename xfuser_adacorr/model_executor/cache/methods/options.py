"""Options common to the methods, and the checks that they share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from .base import Either, PerModel, Rule, StackMethod, Warmup

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.adacorrection import Repair
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily
    from xfuser_adacorr.model_executor.cache.engine import Lane
    from xfuser_adacorr.model_executor.cache.forecasts import Forecast
    from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
    from xfuser_adacorr.model_executor.cache.schedulers import Places

CORRECTED_SUFFIX = "+AdaCorrection"
AUTO_TOLERANCE = 0.004
CORRECTED_TOLERANCE = 0.01
DEFAULT_CAP = 2 / 3
"""Share of a run that the default tolerances compute, about, at the most."""


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> None:
    """Raise `TypeError` or `ValueError` that names the option and its range."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    limits = [
        (f"above {above}", above is None or value > above),
        (f"at least {least}", least is None or value >= least),
        (f"at most {most}", most is None or value <= most),
    ]
    missed = [text for text, holds in limits if not holds]
    if not math.isfinite(value) or missed:
        raise ValueError(f"{name} must be {' and '.join(['finite', *missed])}, got {value!r}")


def check_count(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    """The same for whole numbers."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}")


def check_tolerance(options: Any, prefix: str = "") -> None:
    """Check ``tolerance``, ``target_compute`` and ``target_speedup`` of an option class."""
    check_number(f"{prefix}tolerance", options.tolerance, above=0, optional=True)
    check_number("target_compute", options.target_compute, above=0, most=1, optional=True)
    check_number("target_speedup", options.target_speedup, least=1, optional=True)
    given = [
        name
        for name in ("tolerance", "target_compute", "target_speedup")
        if getattr(options, name) is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them, each sets the tolerance")
    if given and given[0] != "tolerance" and options.gamma == 0:
        raise ValueError(f"gamma must be above 0 with {given[0]}: at 0 nothing is steered")


def compute_target(options: Any) -> float | None:
    """Share of the steps to be computed, from ``target_compute`` or ``target_speedup``."""
    if options.target_speedup is not None:
        return 1.0 / options.target_speedup
    return options.target_compute


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaCorrection:
    """The correction of a base method: measure the drift, refresh where it is too large, repair.

    Raises `ValueError` or `TypeError` that names the option and what is accepted.
    """

    gamma: float = 1.0
    """gamma >= 0 in the weight w = clip(gamma * S, 0, 1); 0: never refresh for w."""
    lambda_: float = 1.0
    """lambda >= 0, weight of the spatial term in the offset score S."""
    tolerance: float | None = None
    """Relative error of the latents tolerated between two refreshes, > 0; None: 0.01."""
    target_compute: float | None = None
    """Share of the steps to be computed, in (0, 1], in place of a tolerance."""
    target_speedup: float | None = None
    """The same as its inverse, >= 1: counted compute, not wall-clock time."""

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_number("lambda_", self.lambda_, least=0)
        check_tolerance(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Literal:
    """AdaCorrection as printed: a blend in every block, with every fresh block computed.

    For study and tests; it saves no compute.
    """

    gamma: float = 1.0
    """gamma >= 0 in the weight w = clip(gamma * S, 0, 1)."""
    lambda_: float = 1.0
    """lambda >= 0, weight of the spatial term in the offset score S."""

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_number("lambda_", self.lambda_, least=0)


def error_rule(options: Any, default_tolerance: float, places: "Places | None") -> Rule:
    """The `ErrorRule` that ``options`` (`AdaCorrection`, or Auto's) ask for."""
    from xfuser_adacorr.model_executor.cache.adacorrection.budget import Budget
    from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule

    fraction, steps = compute_target(options), places and places.steps
    budget = None if fraction is None else Budget(fraction, steps)
    nothing_given = options.tolerance is None and budget is None and options.gamma == 1.0
    cap = Budget(DEFAULT_CAP, steps) if nothing_given and steps else None
    tolerance = options.tolerance or default_tolerance
    return ErrorRule(options.gamma, options.lambda_, tolerance, budget, cap)


def within_budget(rule: Rule, own: Rule) -> Rule:
    """``rule``, overridden by the budget of its `ErrorRule` ``own`` if it has one."""
    from xfuser_adacorr.model_executor.cache.adacorrection.budget import Budgeted

    return rule if own.budget is None else Budgeted(rule, own.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What every method's options tell the engine."""

    label: ClassVar[str]
    """Name of the method, without a correction."""

    @property
    def name(self) -> str:
        """Display name: ``Fb``, ``Fb+AdaCorrection``, ``Auto``."""
        corrected = isinstance(getattr(self, "correction", None), (AdaCorrection, Literal))
        return self.label + (CORRECTED_SUFFIX if corrected else "")

    @property
    def needs_blocks(self) -> bool:
        """Whether the method measures, or skips, blocks inside the model."""
        return False

    @property
    def answers_steps(self) -> bool:
        """Whether a forecast of the guided output stands in for whole steps."""
        return True

    @property
    def needs_steps(self) -> bool:
        """Whether the number of steps has to be known: from a scheduler, or ``num_steps``."""
        return False

    def bound_to(self, model: nn.Module) -> "Method":
        """The options with what is stored beside ``model`` read; asked once, when enabled."""
        return self

    def bound_to_pipeline(self, pipe: Any, models: Mapping[str, nn.Module]) -> "Method":
        """The same for what is stored for all ``models`` of ``pipe``, which may be a model."""
        return self

    def make_stack(self, model: nn.Module, family: "ModelFamily") -> StackMethod:
        """The method inside one model; for those that need blocks."""
        raise NotImplementedError

    def make_rule(self, places: "Places | None", inside: Mapping[str, Rule]) -> Rule:
        """The rule of a run (of a branch); for those that answer steps.

        ``inside`` are the rules of what `make_stack` made for each model, by its name.
        """
        raise NotImplementedError

    def make_forecast(self, scope: "DecisionScope") -> "Forecast":
        from xfuser_adacorr.model_executor.cache.forecasts import DampedLine

        return DampedLine(scope.summed)

    def make_repair(self, stepper: Any) -> "Repair":
        """What suits the sampler; ``stepper`` None: Euler steps are assumed."""
        from xfuser_adacorr.model_executor.cache.adacorrection import EulerRepair, make_repair

        return EulerRepair() if stepper is None else make_repair(stepper)

    def make_lane(
        self,
        places: "Places",
        begin: int,
        inside: Mapping[str, Rule],
        stepper: Any,
        scope: "DecisionScope",
    ) -> "Lane":
        """All of that for a run of ``stepper`` on ``places``, whose first step is ``begin``."""
        from xfuser_adacorr.model_executor.cache.engine import Lane

        rule = self.make_rule(places, inside)
        return Lane(rule, self.make_forecast(scope), self.make_repair(stepper))

    def to_dict(self) -> dict[str, Any]:
        """The flat options, as YAML files and the command line have them."""
        from xfuser_adacorr.config import to_flat

        return to_flat(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StackOptions(Method):
    """Options of the methods inside the model."""

    threshold: float | None = None
    """Of the method's relative change, >= 0; None: the family's default, which is looser where
    AdaCorrection corrects."""
    warmup: int = 0
    """Calls at the start of a run that are always computed (the first one always is)."""
    num_steps: int | None = None
    """Sampling steps; None: taken from the scheduler, or inferred from the timesteps."""
    correction: AdaCorrection | Literal | None = None
    """What corrects the method; None: nothing."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, least=0, optional=True)
        check_count("warmup", self.warmup, least=0)
        check_count("num_steps", self.num_steps, least=1, optional=True)
        if not isinstance(self.correction, (AdaCorrection, Literal, type(None))):
            raise TypeError(
                f"correction must be AdaCorrection(...), Literal(...) or None, got "
                f"{self.correction!r}"
            )

    @property
    def needs_blocks(self) -> bool:
        return True

    @property
    def answers_steps(self) -> bool:
        return isinstance(self.correction, AdaCorrection)

    @property
    def needs_steps(self) -> bool:
        return self.answers_steps and compute_target(self.correction) is not None

    def make_stack(self, model: nn.Module, family: "ModelFamily") -> StackMethod:
        from .literal import LiteralBlend

        method = self.stack_method(model, family)
        method.signal_only = self.correction is not None
        if isinstance(self.correction, Literal):
            method = LiteralBlend(method, self.correction.gamma, self.correction.lambda_, family)
        if not self.answers_steps:  # else the rule of the steps has the warmup (`make_rule`)
            method.warmup = self.warmup
        return method

    def stack_method(self, model: nn.Module, family: "ModelFamily") -> StackMethod:
        """The plain method inside ``model``."""
        raise NotImplementedError

    def make_rule(self, places: "Places | None", inside: Mapping[str, Rule]) -> Rule:
        own = error_rule(self.correction, CORRECTED_TOLERANCE, places)
        rule = within_budget(Either(PerModel(inside), own) if inside else own, own)
        return Warmup(rule, self.warmup) if self.warmup else rule

    def threshold_for(self, family: "ModelFamily") -> float:
        """The threshold given, or the family's default; `ValueError` where there is neither."""
        if self.threshold is not None:
            return self.threshold
        found: Mapping[str, float] = family.thresholds
        default = found.get(self.name, found.get(self.label))
        if default is None:
            raise ValueError(
                f"rel_l1_thresh must be given: family {family.name!r} has no default for "
                f"{self.name}"
            )
        return default
