"""Whether options act smoothly, and whether defaults act at all and are worth their compute.

Every method is run with its default at several numbers of steps, beside fewer steps without a cache
at the same compute; and at the usual number of steps over fine settings of its main option.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmark.models.families import FAMILIES
from benchmark.models.loading import load_documented
from benchmark.models.names import CORRECTED, changed
from benchmark.report.tables import Table
from benchmark.run.rows import Row, cached_row, method_config, same_compute_rows, uncached_row
from benchmark.settings import Settings
from benchmark.studies.catalogue import CliffOptions
from benchmark.studies.session import kept_pictures, opened
from xfuser_adacorr import CacheConfig

Result = Mapping[str, Any]
"""Of one row: ``name``, ``steps``, ``setting``, ``compute`` and ``psnr_db`` (means)."""

PSNR_DIP_DB = 2.0
"""How far PSNR may rise again while the setting gets looser."""
COMPUTE_JUMP = 0.15
"""Of a run, that compute may change by between neighbouring settings."""
NEVER = 0.999
"""Compute from which a method is said to have skipped nothing."""


def main_option(name: str) -> str:
    """Flat name of the option that trades compute for fidelity in this method."""
    corrected = name == "Auto" or name.endswith(CORRECTED)
    return "adacorr_tolerance" if corrected else "rel_l1_thresh"


def settings_around(default: float, count: int, factor: float) -> list[float]:
    """``count`` settings, each ``factor`` times the one before, the default in their middle."""
    return [float(f"{default * factor ** (k - count // 2):.3g}") for k in range(count)]


def largest_dip(psnr_db: Sequence[float]) -> float:
    """Most that PSNR, in the order of looser settings, rises above an earlier value."""
    lowest = accumulate(psnr_db, min)
    return max(now - least for now, least in zip(psnr_db, lowest, strict=True))


def largest_jump(compute: Sequence[float]) -> float:
    """Largest change of the compute fraction between neighbouring settings."""
    return max((abs(b - a) for a, b in pairwise(compute)), default=0.0)


def measure(
    store: Any,
    rows: Sequence[tuple[Row, float | None]],
    references: Mapping[int, Any],
    make: Callable[[Row], Any],
    psnr: Callable[[Any, Any], list[float]],
) -> list[Result]:
    """`Result` of every (row, setting), each kept as soon as it is finished.

    ``references`` are the uncached pictures by the number of steps; ``make(row)`` makes pictures,
    `generate.Generated`.
    """
    results = []
    for row, setting in rows:
        kept = store.row(row.key)
        if kept is None:
            made = make(row)
            fractions = [summary.compute_fraction for summary in made.summaries]
            kept = {
                "name": row.name,
                "steps": row.reference_steps,
                "setting": setting,
                "taken": row.num_inference_steps,
                "compute": fmean(fractions or [row.num_inference_steps / row.reference_steps]),
                "psnr_db": fmean(psnr(made.pictures, references[row.reference_steps])),
            }
            store.save_row(row.key, kept)
        results.append(kept)
    return results


def fewer_steps(result: Result, fewer: Sequence[Result]) -> float | None:
    """PSNR of the best solver with about as many steps as ``result`` computes; None without."""
    near = [
        other["psnr_db"]
        for other in fewer
        if other["steps"] == result["steps"]
        and abs(other["taken"] - result["compute"] * result["steps"]) <= 0.5
    ]
    return max(near, default=None)


def defaults_table(results: Sequence[Result], fewer: Sequence[Result]) -> Table:
    """A line a method: compute and PSNR at each number of steps, and what is wrong there."""
    counts = sorted({result["steps"] for result in results})
    cells = []
    for name in dict.fromkeys(result["name"] for result in results):
        line = [name]
        for steps in counts:
            (one,) = [r for r in results if r["name"] == name and r["steps"] == steps]
            other = fewer_steps(one, fewer)
            said = f"{one['compute']:.2f}, {one['psnr_db']:.1f}"
            if one["compute"] > NEVER:
                said = "never skips"
            elif other is not None:
                below = one["psnr_db"] < other
                said += f" ({other:.1f}{', **below**' if below else ''})"
            line.append(said)
        cells.append(tuple(line))
    heads = ("default", *(f"{steps} steps" for steps in counts))
    return Table("Defaults: compute, PSNR dB (fewer steps)", heads, cells)


def sweeps_table(results: Sequence[Result]) -> Table:
    """A line a method: its range, and the largest dip and jump over its settings."""
    cells = []
    for name in dict.fromkeys(result["name"] for result in results):
        own = sorted((r for r in results if r["name"] == name), key=lambda r: r["setting"])
        psnr, compute = [r["psnr_db"] for r in own], [r["compute"] for r in own]
        dip, jump = largest_dip(psnr), largest_jump(compute)
        cells.append(
            (
                name,
                f"{own[0]['setting']:g} to {own[-1]['setting']:g}",
                f"{compute[0]:.2f} to {compute[-1]:.2f}",
                f"{psnr[0]:.1f} to {psnr[-1]:.1f}",
                f"{dip:.1f}{' **cliff**' if dip > PSNR_DIP_DB else ''}",
                f"{jump:.2f}{' **cliff**' if jump > COMPUTE_JUMP else ''}",
            )
        )
    heads = ("method", "settings", "compute", "PSNR dB", "largest dip, dB", "largest jump")
    return Table("Main option in fine settings", heads, cells)


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings, options = document["settings"], document["options"]
    environment = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    tables = "\n".join(table.markdown() for table in _tables(document))
    return (
        f"# Defaults and cliffs\n\nModel `{settings['model']}`, {len(document['prompts'])} prompts "
        f"of the {settings['split']} split.\n\n{tables}\n"
        "- PSNR: mean over the prompts, against the uncached pictures with as many steps. In "
        "brackets: the better of two solvers without a cache, with as many steps as were computed."
        f"\n- Settings: {options['settings']}, each {options['factor']:g} times the one before. "
        f"A dip (PSNR that rises although the setting gets looser) above {PSNR_DIP_DB:g} dB and a "
        f"jump of compute above {COMPUTE_JUMP:g} of a run are cliffs.\n"
        f"- Environment: {environment}.\n"
    )


def _tables(document: Mapping[str, Any]) -> list[Table]:
    tables = [defaults_table(document["defaults"], document["fewer_steps"])]
    return tables + ([sweeps_table(document["sweeps"])] if document["sweeps"] else [])


def run(settings: Settings, options: CliffOptions, console: Console) -> None:
    """Make all pictures, then write ``results.json`` and ``report.md``."""
    family, counts = FAMILIES[settings.model_type], settings.num_inference_steps
    solver, usual = family.solvers[0], family.steps
    documented = load_documented(settings)
    configs = {name: method_config(name, documented, {}) for name in settings.cache_methods}
    defaults = [
        (cached_row(name, steps, CacheConfig.from_name(name), solver), None)
        for steps in counts
        for name in configs
    ]
    sweeps = []
    for name, config in configs.items() if options.settings > 1 else ():
        option = main_option(name)
        around = settings_around(config.to_dict()[option], options.settings, options.factor)
        sweeps += [
            (cached_row(name, usual, changed(config, **{option: value}), solver), value)
            for value in around
        ]
    identity = {"settings": options.settings, "factor": options.factor}
    with opened(settings, console, identity) as session:
        store = session.bench.store
        needed = dict.fromkeys((*counts, *((usual,) if sweeps else ())))
        references = {
            steps: kept_pictures(store, uncached_row(steps, solver), session.make)
            for steps in needed
        }

        def measured(rows: Sequence[tuple[Row, float | None]]) -> list[Result]:
            return measure(store, rows, references, session.make, session.psnr)

        found = measured(defaults)
        fractions = {row.key: one["compute"] for (row, _), one in zip(defaults, found, strict=True)}
        rows = [row for row, _ in defaults]
        fewer = [(row, None) for row in same_compute_rows(rows, fractions, family.solvers)]
        document = {
            "prompts": session.bench.entries,
            "options": identity,
            "defaults": found,
            "fewer_steps": measured(fewer),
            "sweeps": measured(sweeps),
        }
    session.write(document, render, _tables)
