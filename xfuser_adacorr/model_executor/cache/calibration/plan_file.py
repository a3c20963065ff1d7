"""Learned plans: refreshed steps and fitted coefficients, stored beside a model and bound to it."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import config_of
from xfuser_adacorr.model_executor.cache.flow_coordinates import direction, flow_points
from xfuser_adacorr.model_executor.cache.refreshes import nearest_steps
from xfuser_adacorr.model_executor.cache.schedulers import Places

from .files import model_fingerprint, write_whole
from .learned_fit import adams_bashforth

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
PLAN_SCHEMA = 1
TIME_TOLERANCE = 1e-3
"""Difference of flow times (in [0, 1]) up to which two runs are taken to have the same steps."""
NEAR_BUDGET = 0.05
"""Difference of the shares of computed steps up to which a course stands for a target."""
_NUMBERS = re.compile(r"\[[^\[\]{}]*\]")
PACKAGES = ("xfuser-adacorr", "diffusers", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """One budget's steps and coefficients."""

    steps: tuple[int, ...]
    """The computed steps, from 0 on."""
    coefficients: tuple[tuple[float, ...], ...]
    """For each of them the weights of all velocities so far in the way to the next one."""
    psnr_db: float | None
    """Mean PSNR of the pictures on the calibration prompts; None where it was not measured."""
    psnr_spread_db: float | None = None
    """Standard deviation over these prompts."""
    measured_on: int = 0
    """Prompts that the PSNR was measured on."""
    rule_psnr_db: float | None = None
    """Mean PSNR of `Auto`'s own rule on these prompts, with as many computed steps."""

    @property
    def loses_to_the_rule(self) -> bool:
        """Whether `Auto`'s own rule was measured, and nearer to the uncached pictures."""
        known = self.psnr_db is not None and self.rule_psnr_db is not None
        return known and self.rule_psnr_db > self.psnr_db

    def __post_init__(self) -> None:
        steps = list(self.steps)
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"steps must rise from 0, got {steps}")
        if [len(row) for row in self.coefficients] != list(range(1, len(steps) + 1)):
            raise ValueError(
                f"coefficients must be {len(steps)} rows of 1, 2, ... numbers, got rows of "
                f"{[len(row) for row in self.coefficients]}"
            )
        if not all(math.isfinite(number) for row in self.coefficients for number in row):
            raise ValueError(f"coefficients of the course of {len(steps)} steps are not finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The courses fitted on one sampler's steps."""

    name: str
    sampler: dict[str, Any]
    """Class and options (`describe_sampler`)."""
    times: tuple[float, ...]
    """Flow time of every step and of the end."""
    guidance_scale: float | None
    """None where the pipeline does not tell it."""
    courses: tuple[Course, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was calibrated, and package versions."""
    interpolated: bool = False
    """Carried over to other steps than it was fitted on."""

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def misfit(self, places: Places, guidance_scale: float | None = None) -> str | None:
        """What keeps the plan from a run on ``places``, in one line; None if it fits."""
        told = [f"{name} {mine!r}, not {theirs!r}" for name, mine, theirs in self._told(places)]
        if told:
            return f"another sampler: {', '.join(told)}"
        if self.guidance_scale is not None and guidance_scale is not None:
            if abs(self.guidance_scale - guidance_scale) > 1e-6:
                return f"guidance scale {self.guidance_scale:g}, not {guidance_scale:g}"
        if len(places.steps) != self.num_steps:
            return f"{self.num_steps} steps, not {len(places.steps)}"
        times = [point.time for point in flow_points(places)]
        apart = max(abs(a - b) for a, b in zip(times, self.times, strict=True))
        if apart > TIME_TOLERANCE:
            return f"other noise levels (another picture size or shift), up to {apart:.2g} apart"
        return None

    def _told(self, places: Places) -> list[tuple[str, Any, Any]]:
        mine, theirs = self.sampler, places.sampler
        names = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
        return [(name, mine.get(name), theirs.get(name)) for name in names]

    def carried_over(self, places: Places) -> "Plan":
        """The plan for other steps, whose PSNR nobody measured.

        Each course keeps its number of refreshes, on the steps nearest in flow time. A coefficient
        is Adams-Bashforth's between these steps, and the fitted departure from it in proportion to
        the length of the gap.
        """
        times = [point.time for point in flow_points(places)]
        sign = direction(places)
        fitting = [course for course in self.courses if len(course.steps) < len(times)]
        courses = tuple(self._carried(course, times, sign) for course in fitting)
        return replace(self, times=tuple(times), courses=courses, interpolated=True)

    def _carried(self, course: Course, times: Sequence[float], sign: float) -> Course:
        wanted = [self.times[step] for step in course.steps]
        steps = nearest_steps(times[:-1], wanted)
        rows = []
        for k, row in enumerate(course.coefficients):
            own = [*(self.times[step] for step in course.steps), self.times[-1]][: k + 2]
            new = [*(times[step] for step in steps), times[-1]][: k + 2]
            before, after = (adams_bashforth(each[:-1], each[-1]) for each in (own, new))
            scale = (new[-1] - new[-2]) / (own[-1] - own[-2])
            rows.append(
                tuple(b + scale * (c - a) for a, b, c in zip(before, after, row, strict=True))
            )
        return Course(steps=steps, coefficients=tuple(rows), psnr_db=None)

    def course_for(
        self, target_compute: float | None = None, target_psnr: float | None = None
    ) -> Course:
        """The course nearest to a share of computed steps, or the cheapest with such a PSNR.

        Raises `ValueError` where there is none within `NEAR_BUDGET`, or none so good.
        """
        if target_psnr is not None:
            enough = [c for c in self.courses if (c.psnr_db or 0.0) >= target_psnr]
            if not enough:
                best = max((c.psnr_db or 0.0) for c in self.courses)
                raise ValueError(
                    f"target_psnr: no course of plan {self.name} reaches {target_psnr:g} dB; "
                    f"the best has {best:.1f} dB"
                )
            return min(enough, key=lambda c: len(c.steps))
        shares = {len(c.steps) / self.num_steps: c for c in self.courses}
        nearest = min(shares, key=lambda share: (abs(share - target_compute), share))
        if abs(nearest - target_compute) > NEAR_BUDGET:
            raise ValueError(
                f"target_compute: plan {self.name} has "
                f"{', '.join(f'{share:.2f}' for share in sorted(shares))}, none near "
                f"{target_compute:g}"
            )
        return shares[nearest]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """All plans of one model."""

    fingerprints: dict[str, str]
    """Of every denoiser, by the component's name."""
    plans: tuple[Plan, ...]
    path: str = ""

    def plan_for(
        self, places: Places, guidance_scale: float | None = None, interpolate: bool = False
    ) -> Plan:
        """The plan for a run; `ValueError` with what each of them was fitted on instead.

        With ``interpolate`` a plan of the same sampler is carried over where none fits as it is:
        the one with the nearest number of steps.
        """
        misfits = [plan.misfit(places, guidance_scale) for plan in self.plans]
        for plan, misfit in zip(self.plans, misfits, strict=True):
            if misfit is None:
                return plan
        known = [plan for plan in self.plans if not plan._told(places)]
        if interpolate and known:
            count = len(places.steps)
            return min(known, key=lambda plan: abs(plan.num_steps - count)).carried_over(places)
        found = "; ".join(
            f"{plan.name} has {misfit}" for plan, misfit in zip(self.plans, misfits, strict=True)
        )
        raise ValueError(f"plan: {self.path or 'no plan'} does not fit this run: {found}")

    def check_models(self, models: Mapping[str, nn.Module]) -> None:
        """`ValueError` if the plans are other models'."""
        found = fingerprints(models)
        other = sorted(
            name for name in self.fingerprints if found.get(name) != self.fingerprints[name]
        )
        if other or not self.fingerprints:
            raise ValueError(
                f"plan: {self.path} was fitted on another {' and '.join(other)}; calibrate this "
                "model, or remove the file"
            )

    def schedules_of(self, places: Places) -> list[tuple[int, ...]]:
        """The computed steps of all courses that were fitted on these steps."""
        fitting = [plan for plan in self.plans if plan.misfit(places) is None]
        return [course.steps for plan in fitting for course in plan.courses]

    def with_plan(self, plan: Plan) -> "PlanFile":
        """With ``plan`` in the place of the one that was fitted on the same run, or added."""
        others = [
            old
            for old in self.plans
            if (old.sampler, len(old.times), old.guidance_scale)
            != (plan.sampler, len(plan.times), plan.guidance_scale)
            or max(abs(a - b) for a, b in zip(old.times, plan.times, strict=True)) > TIME_TOLERANCE
        ]
        return replace(self, plans=(*others, plan))

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        del content["path"]
        return {"method": "Learned", "schema": PLAN_SCHEMA, **content}

    def save(self, path: str | Path) -> None:
        """Write the file as JSON, whole or not at all; a list of numbers is a line."""
        text = json.dumps(self.to_dict(), indent=1)
        text = _NUMBERS.sub(lambda found: " ".join(found.group().split()), text)
        write_whole(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PlanFile":
        """Read what `save` wrote; `FileNotFoundError`, or `ValueError` if it is something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"plan: no file {path}")
        try:
            content = json.loads(path.read_text())
            if content.get("method") != "Learned" or content.get("schema") != PLAN_SCHEMA:
                raise ValueError(
                    f"method {content.get('method')!r}, schema {content.get('schema')!r}"
                )
            plans = tuple(_plan(each) for each in content["plans"])
            return cls(fingerprints=dict(content["fingerprints"]), plans=plans, path=str(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"plan: {path} is not a file of learned plans of schema {PLAN_SCHEMA} ({error})"
            ) from error


def _plan(content: Mapping[str, Any]) -> Plan:
    courses = tuple(course_from(each) for each in content["courses"])
    times = tuple(float(t) for t in content["times"])
    if not courses or any(course.steps[-1] >= len(times) - 1 for course in courses):
        raise ValueError("a course computes steps beyond the run, or there is none")
    return Plan(**{**content, "times": times, "courses": courses})


def course_from(content: Mapping[str, Any]) -> Course:
    """The inverse of ``asdict``."""
    rows = tuple(tuple(float(b) for b in row) for row in content["coefficients"])
    return Course(
        **{**content, "steps": tuple(int(s) for s in content["steps"]), "coefficients": rows}
    )


def fingerprints(models: Mapping[str, nn.Module]) -> dict[str, str]:
    return {name: model_fingerprint(model) for name, model in models.items()}


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plan_beside(pipe: Any, models: Mapping[str, nn.Module]) -> Path | None:
    """The plan file in the pipeline's directory, or in one of its models'."""
    sources = [*([] if isinstance(pipe, nn.Module) else [pipe]), *models.values()]
    for source in sources:
        directory = config_of(source).get("_name_or_path")
        if directory and (Path(directory) / PLAN_FILE).is_file():
            return Path(directory) / PLAN_FILE
    return None
