"""The rows of a sweep: every method at every setting of its knob, and fewer steps."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmark.models.names import CORRECTED, LEARNED, LEARNING, SCHEDULES, UNCACHED
from benchmark.models.package import PLAN_FILE, Plan, PlanFile, evenly_spaced
from benchmark.peers import is_peer, peer_config, sweep_options
from benchmark.run.rows import (
    SOLVERS,
    Row,
    cached_row,
    fewer_steps_row,
    method_config,
    uncached_row,
)
from benchmark.score.curves import FRACTIONS
from xfuser_adacorr import CacheConfig

Sweeps = Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]
"""Steps -> method -> options tried. Other step counts take the lists of the nearest one."""

FEWER_STEPS = (0.18, 0.54)
"""Fewer-steps rows cover these shares of the reference's steps."""
SCHEDULE_SHARES = (0.166, 0.2, *FRACTIONS, 0.54)
"""Shares of computed steps of the schedules that are tried, rounded up to whole steps."""
LEARNED_SHARES = (0.17, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""Shares of computed steps of the runs that learn from a generation."""


def _options(method: str, value: Any) -> dict[str, Any]:
    if method == "Auto":
        return {"adacorr_tolerance": value}
    threshold, *tolerance = value if method.endswith(CORRECTED) else (value,)
    options = {"rel_l1_thresh": threshold}
    if tolerance:
        options["adacorr_tolerance"] = tolerance[0]
    if method.startswith("Ada"):  # a codebook calibrated for the model would take its place
        options["codebook"] = "fast"
    return options


def read_sweeps(path: Path) -> dict[str, Sweeps]:
    """The sweeps of a file, by family."""
    return {
        family: {
            steps: {method: [_options(method, v) for v in values] for method, values in by.items()}
            for steps, by in by_steps.items()
        }
        for family, by_steps in yaml.safe_load(path.read_text()).items()
    }


SWEEPS = read_sweeps(Path(__file__).with_name("sweeps.yaml"))


def nearest_sweep(sweeps: Sweeps, steps: int) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The lists of the step count nearest to this one."""
    return sweeps[min(sweeps, key=lambda known: abs(known - steps))]


def sweep_rows(
    methods: Sequence[str],
    step_counts: Sequence[int],
    documented: Mapping[str, CacheConfig],
    options: Mapping[str, Any],
    solvers: Sequence[str] = SOLVERS,
    sweeps: Sweeps = SWEEPS["flux"],
) -> list[Row]:
    """Per step count: uncached, every method at every setting of its knob, both solvers."""
    own, rows = solvers[0], []
    for steps in step_counts:
        rows.append(uncached_row(steps, own))
        listed = nearest_sweep(sweeps, steps)
        for name in methods:
            if name == UNCACHED:
                continue
            if is_peer(name):
                configs = [peer_config(name, o) for o in sweep_options(name, listed["Fb"], steps)]
            elif name in (LEARNED, LEARNING):
                continue  # `learned_rows`
            else:
                knobs = even_schedules(steps) if name in SCHEDULES else listed[name]
                configs = [method_config(name, documented, {**options, **knob}) for knob in knobs]
            rows += [cached_row(name, steps, config, own) for config in configs]
        rows += fewer_steps_rows(steps, solvers)
    return list({row.key: row for row in rows}.values())


def stored_plan(model: Path, steps: int, guidance_scale: float | None) -> Plan | None:
    """The learned plan beside a model for runs of so many steps; None if there is none."""
    if not (model / PLAN_FILE).is_file():
        return None
    for plan in PlanFile.load(model / PLAN_FILE).plans:
        told = None not in (plan.guidance_scale, guidance_scale)
        if plan.num_steps == steps and not (told and plan.guidance_scale != guidance_scale):
            return plan
    return None


def learned_rows(
    names: Sequence[str], model: Path, steps: int, guidance_scale: float | None, solver: str
) -> list[Row]:
    """Of `LEARNED` a row for every budget of the plan beside the model, if there is one for these
    steps; of `LEARNING` a row for each of `LEARNED_SHARES`."""
    rows = []
    plan = stored_plan(model, steps, guidance_scale) if LEARNED in names else None
    if plan is not None:
        digest = hashlib.sha256(repr(plan.courses).encode()).hexdigest()[:8]
        for course in plan.courses:
            config = CacheConfig.from_name(LEARNED, target_compute=len(course.steps) / steps)
            rows.append(replace(cached_row(LEARNED, steps, config, solver), plan=digest))
    if LEARNING in names:
        configs = [method_config(LEARNING, {}, {"target_compute": x}) for x in LEARNED_SHARES]
        rows += [cached_row(LEARNING, steps, config, solver) for config in configs]
    return rows


def fewer_steps_rows(steps: int, solvers: Sequence[str]) -> list[Row]:
    """Uncached runs whose compute covers that of the methods, by each solver."""
    low, high = (share * steps for share in FEWER_STEPS)
    counts = range(max(2, math.floor(low)), math.ceil(high) + 1, max(1, steps // 12))
    return [fewer_steps_row(solver, steps, count) for solver in solvers for count in counts]


def schedule_budgets(steps: int) -> list[int]:
    """Computed steps of the schedules that are tried."""
    return sorted({max(2, math.ceil(share * steps)) for share in SCHEDULE_SHARES})


def even_schedules(steps: int) -> list[dict[str, Any]]:
    """Schedules with evenly spaced computed steps, as options."""
    every = list(range(steps))
    return [{"schedule": tuple(evenly_spaced(every, n))} for n in schedule_budgets(steps)]
