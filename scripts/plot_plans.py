"""Draw the coefficients of the shipped learned plans against Adams-Bashforth's of order 2."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.models.families import FAMILIES
from benchmark.run.sweep import stored_plan
from benchmark.settings import PIPELINES, ROOT
from xfuser_adacorr.model_executor.cache.calibration.learned_fit import adams_bashforth
from xfuser_adacorr.model_executor.cache.calibration.plan_file import Course, Plan

STEPS = {"pixart": 20, "flux": 28, "dit": 28, "opensora": 30}
PANELS = ("of the last velocity", "of the one before", "of all older ones")


def shares(row: tuple[float, ...] | list[float], gap: float) -> tuple[float, float, float]:
    """A row's weights over the gap: of the last velocity, the one before, and the older ones."""
    padded = [0.0, 0.0, *row]
    return padded[-1] / gap, padded[-2] / gap, sum(padded[:-2]) / gap


def course_at(plan: Plan, share: float) -> Course:
    return min(plan.courses, key=lambda each: abs(len(each.steps) / plan.num_steps - share))


def draw(path: Path, share: float) -> None:
    """A panel for each of `PANELS`, over the flow time of the refresh; a colour a family."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4))
    for colour, (name, steps) in enumerate(STEPS.items()):
        plan = stored_plan(PIPELINES / name, steps, FAMILIES[name].guidance_scale)
        if plan is None:
            continue
        course = course_at(plan, share)
        times = [plan.times[step] for step in course.steps]
        ends = [*times[1:], plan.times[-1]]
        fitted, theirs = [], []
        for k, row in enumerate(course.coefficients):
            gap = ends[k] - times[k]
            fitted.append(shares(row, gap))
            theirs.append(shares(adams_bashforth(times[: k + 1], ends[k]), gap))
        text = f"{name}, {len(course.steps)} of {steps}"
        for axis, found, usual in zip(
            axes, zip(*fitted, strict=True), zip(*theirs, strict=True), strict=True
        ):
            axis.plot(times, found, "o-", color=f"C{colour}", label=text)
            axis.plot(times, usual, "--", color=f"C{colour}", linewidth=1, alpha=0.6)
    for axis, title in zip(axes, PANELS, strict=True):
        axis.set(title=f"weight {title}", xlabel="flow time t of the refresh")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, title="dashed: Adams-Bashforth", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compute", type=float, default=0.35, help="share of the steps (0.35)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/learned.png")
    arguments = parser.parse_args()
    draw(arguments.output, arguments.compute)


if __name__ == "__main__":
    main()
