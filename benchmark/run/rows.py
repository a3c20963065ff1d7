"""The rows of a run: which method or solver, with which options, at how many steps."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.models.families import DPM_SOLVER, EULER, Ode
from benchmark.models.names import (
    CORRECTED,
    LEARNED,
    LEARNING,
    SCHEDULE,
    SCHEDULE_OPTIONS,
    TARGETS,
    UNCACHED,
    changed,
)
from benchmark.peers import PeerConfig, is_peer, peer_config
from xfuser_adacorr import Auto, CacheConfig

SOLVERS = (EULER, DPM_SOLVER)
"""FLUX's: its own, and another."""
ODE = "ODE"
LITERAL = "literal"
"""The ``adacorr_mode`` that saves no compute."""
LEARNING_COMPUTE = 0.35
"""Share of the steps that a run which learns computes, if none is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the results."""

    name: str
    """The method's display name, or the solver with fewer steps."""
    reference_steps: int
    """Steps of the uncached run that the row is compared with."""
    num_inference_steps: int
    """Steps that the row itself takes."""
    solver: str = EULER
    config: CacheConfig | PeerConfig | None = None
    plan: str | None = None
    """Of a row that follows a stored plan the plan's digest: another plan is another row."""

    @property
    def is_reference(self) -> bool:
        return self.name == UNCACHED

    @property
    def is_ode(self) -> bool:
        return self.name == ODE

    @property
    def key(self) -> str:
        """A file name that is the same for the same row in any run."""
        content = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{self.reference_steps}-{slug}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "cache_method": self.name,
            "reference_steps": self.reference_steps,
            "num_inference_steps": self.num_inference_steps,
            "solver": self.solver,
            "config": self.config and self.config.to_dict(),
            **({} if self.plan is None else {"plan": self.plan}),
        }


def uncached_row(steps: int, solver: str = EULER) -> Row:
    return Row(name=UNCACHED, reference_steps=steps, num_inference_steps=steps, solver=solver)


def cached_row(name: str, steps: int, config: CacheConfig | PeerConfig, solver: str = EULER) -> Row:
    return Row(
        name=name, reference_steps=steps, num_inference_steps=steps, solver=solver, config=config
    )


def ode_row(steps: int, ode: Ode) -> Row:
    """The ODE that the uncached run of so many steps approximates."""
    return Row(
        name=ODE,
        reference_steps=steps if ode.per_step_count else ode.steps,
        num_inference_steps=ode.steps,
        solver=ode.solver,
    )


def fewer_steps_row(solver: str, reference_steps: int, steps: int) -> Row:
    return Row(
        name=f"{solver}, fewer steps",
        reference_steps=reference_steps,
        num_inference_steps=steps,
        solver=solver,
    )


def method_config(
    name: str, documented: Mapping[str, CacheConfig], options: Mapping[str, Any]
) -> CacheConfig | PeerConfig:
    """A method's effective options: the file's, overridden by those given explicitly.

    Another project's method takes its recommended ones.

    A corrected method that the file does not list takes its base method's options but for the
    threshold, which is the family's: the base method's own is tighter than a corrected one needs.
    Options go to the methods that have them (`applies`).
    """
    if is_peer(name):
        return peer_config(name)
    if name == LEARNING:
        targets = {o: value for o, value in options.items() if o in TARGETS}
        return Auto(learn=1, use_plan=False, **(targets or {"target_compute": LEARNING_COMPUTE}))
    base = name.removesuffix(CORRECTED)
    if name in documented:
        config = documented[name]
    elif base in documented:
        config = changed(documented[base], enable_adacorrection=True, rel_l1_thresh=None)
    else:
        config = CacheConfig.from_name(name)
    wanted = {o: value for o, value in options.items() if applies(o, name, options)}
    if wanted.get("adacorr_mode") == LITERAL or any(target in wanted for target in TARGETS):
        wanted["adacorr_tolerance"] = None  # a target sets it, and the published blend has none
    return changed(config, **wanted)


def applies(option: str, name: str, options: Mapping[str, Any]) -> bool:
    """Whether a method has an option, if all ``options`` are given.

    The threshold is of the base methods, a codebook of ``Ada``, the correction's options of the
    corrected ones (the tolerance and the targets where they are adaptive), and a schedule and its
    stand-in of ``Schedule``, which has no others.
    """
    base, corrected = name.removesuffix(CORRECTED), name == "Auto" or name.endswith(CORRECTED)
    if is_peer(name) or name == UNCACHED:
        return False
    if name in (LEARNED, LEARNING):
        return option in TARGETS
    if base == SCHEDULE or option in SCHEDULE_OPTIONS:
        of_schedule = base == SCHEDULE and option in SCHEDULE_OPTIONS
        return of_schedule and not (option == "stand_in" and corrected)
    if option == "codebook":
        return base == "Ada"
    if option == "rel_l1_thresh":
        return base != "Auto"
    if option == "adacorr_mode":
        return corrected and base != "Auto"
    literal = options.get("adacorr_mode") == LITERAL and base != "Auto"
    return corrected and not (literal and option in ("adacorr_tolerance", *TARGETS))


def check_options_act(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an option that no method of these names has."""
    for option in options:
        if not any(applies(option, name, options) for name in names):
            raise ValueError(f"--{option}: none of {', '.join(names)} has it")


def comparison_rows(
    methods: Sequence[str],
    step_counts: Sequence[int],
    documented: Mapping[str, CacheConfig],
    options: Mapping[str, Any],
    solvers: Sequence[str] = SOLVERS,
) -> list[Row]:
    """The uncached row of every step count (always), and each method."""
    own, rows = solvers[0], []
    for steps in step_counts:
        rows.append(uncached_row(steps, own))
        rows += [
            cached_row(name, steps, method_config(name, documented, options), own)
            for name in methods
            if name != UNCACHED
        ]
    return rows


def same_compute_rows(
    rows: Sequence[Row], compute_fractions: Mapping[str, float], solvers: Sequence[str] = SOLVERS
) -> list[Row]:
    """For each cached row the two solvers at the nearest number of steps, without repetitions.

    Args:
        rows: rows that were run.
        compute_fractions: of each row, by its key.
        solvers: their names.
    """
    wanted: dict[Row, None] = {}
    for steps in dict.fromkeys(row.reference_steps for row in rows):
        cached = [row for row in rows if row.reference_steps == steps and row.config]
        fewer = {_nearest_steps(compute_fractions[row.key], steps) for row in cached}
        for solver in solvers:
            for count in sorted(fewer - {steps}):
                wanted[fewer_steps_row(solver, steps, count)] = None
    return list(wanted)


def _nearest_steps(fraction: float, steps: int) -> int:
    return min(steps, max(2, math.floor(fraction * steps + 0.5)))


def gamma_lambda_rows(
    methods: Sequence[str],
    step_counts: Sequence[int],
    documented: Mapping[str, CacheConfig],
    options: Mapping[str, Any],
    solvers: Sequence[str] = SOLVERS,
    values: Sequence[float] = (0.5, 1.0, 2.0),
) -> list[Row]:
    """Every corrected method listed (``Auto`` if there is none) over gamma and lambda."""
    corrected = [m for m in methods if m == "Auto" or m.endswith(CORRECTED)] or ["Auto"]
    own, rows = solvers[0], []
    for steps in step_counts:
        rows.append(uncached_row(steps, own))
        for name in corrected:
            base = method_config(name, documented, options)
            rows += [
                cached_row(name, steps, changed(base, adacorr_gamma=g, adacorr_lambda=k), own)
                for g in values
                for k in values
            ]
    return rows
