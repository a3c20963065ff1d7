"""The tables and figure of all Pareto runs: Auto against the best of every kind of rival."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.names import CORRECTED, LEARNED, LEARNING, SCHEDULE
from benchmark.peers import PAPER, is_peer
from benchmark.report.markers import put_between
from benchmark.report.plots import plt
from benchmark.report.reading import read_results
from benchmark.report.tables import MISSING, Table, number
from benchmark.run.store import whole_file
from benchmark.score.bands import compute, seconds
from benchmark.score.curves import FRACTIONS, interpolate, unbeaten
from benchmark.studies.pareto_report import (
    AUTO,
    SPEEDUPS,
    by_method,
    seconds_at_speedups,
    timed,
)
from xfuser_adacorr import METHODS

FIGURE = "pareto.png"
SEARCHED = SCHEDULE + CORRECTED
KINDS: dict[str, Callable[[str], bool]] = {
    LEARNED: lambda name: name == LEARNED,
    LEARNING: lambda name: name == LEARNING,
    "bases + AdaCorrection": lambda name: name.endswith(CORRECTED) and name != SEARCHED,
    "searched schedule + AdaCorrection": lambda name: name == SEARCHED,
    "searched schedule": lambda name: name.startswith(SCHEDULE) and name != SEARCHED,
    "other projects": lambda name: is_peer(name) and not name.startswith(PAPER),
    "methods of papers": lambda name: name.startswith(PAPER),
    "bases": lambda name: name in METHODS and name != AUTO,
    "fewer steps": lambda name: name.endswith("fewer steps"),
}
"""Kind of rival -> whether a method is one."""
WITHOUT_OURS = (
    "searched schedule",
    "other projects",
    "methods of papers",
    "bases",
    "fewer steps",
)
"""The kinds that know nothing of AdaCorrection."""
SHOWN = (0.15, 0.65)
"""Range of total compute in the figure."""
COMPUTED = (5, 7, 10)
"""Computed steps that runs of up to `FEW_STEPS` are compared at."""
FEW_STEPS = 30
TITLES = {"psnr": "uncached run", "psnr_ode": "exact ODE"}

Document = Mapping[str, Any]
Curve = list[tuple[float, float]]
"""Points of (total compute or seconds, PSNR in dB)."""


def read_documents(directory: Path) -> list[Document]:
    """All ``pareto_FAMILY_STEPS.json`` of a directory; `BenchmarkError` if there is none."""
    paths = [
        directory / f"pareto_{family}_{steps}.json"
        for family in FAMILIES
        for steps in sorted(_steps(directory, family), reverse=True)
    ]
    if not paths:
        raise BenchmarkError(f"--update_results: no pareto_FAMILY_STEPS.json in {directory}")
    return [read_results(path) for path in paths]


def _steps(directory: Path, family: str) -> list[int]:
    return [int(path.stem.rpartition("_")[2]) for path in directory.glob(f"pareto_{family}_*.json")]


def named(document: Document) -> str:
    """Family and number of steps."""
    steps = document["results"][0]["reference_steps"]
    return f"{document['settings']['model_type']}, {steps} steps"


def best(entries: Sequence[Document], kinds: Sequence[str]) -> Document | None:
    """The entry, of one quantity and fraction, with the highest value among these kinds."""
    chosen = [
        entry
        for entry in entries
        if entry["value"] is not None and any(KINDS[kind](entry["cache_method"]) for kind in kinds)
    ]
    return max(chosen, key=lambda entry: entry["value"], default=None)


def summary_table(documents: Sequence[Document], quantity: str) -> Table:
    """PSNR in dB of Auto and of the best of each kind, a row for each run and of `FRACTIONS`.

    The last column is what Auto gains over the best of `WITHOUT_OURS`, in brackets where the band
    of the difference contains 0.
    """
    cells = []
    for document in documents:
        for at in FRACTIONS:
            line = [
                e for e in document["at_fractions"] if e["quantity"] == quantity and e["at"] == at
            ]
            own = next(e for e in line if e["cache_method"] == AUTO)
            found = [own, *(best(line, [kind]) for kind in KINDS)]
            numbers = [number(entry and entry["value"], 1) for entry in found]
            cells.append((named(document), f"{at}", *numbers, _gain(best(line, WITHOUT_OURS))))
    title = f"PSNR in dB to the {TITLES[quantity]}"
    return Table(title, ("run", "compute", AUTO, *KINDS, f"{AUTO} gains"), cells)


def median_table(documents: Sequence[Document]) -> Table:
    """PSNR in dB of the median picture of Auto and of the best of each kind, rows as above.

    Every method but Auto with the best of its settings, by this very median.
    """
    cells = []
    for document in documents:
        found = _best_of_kinds(document["results"], FRACTIONS, median_psnr)
        cells += [
            (named(document), f"{at}", *line) for at, line in zip(FRACTIONS, found, strict=True)
        ]
    heads = ("run", "compute", AUTO, *KINDS)
    return Table("PSNR in dB of the median picture to the uncached run", heads, cells)


def computed_steps_table(documents: Sequence[Document]) -> Table:
    """PSNR in dB of Auto and of the best of each kind at as much compute as `COMPUTED` steps have;
    of the runs of up to `FEW_STEPS` steps."""
    cells = []
    for document in documents:
        steps = document["results"][0]["reference_steps"]
        if steps <= FEW_STEPS:
            places = [round(count / steps, 6) for count in COMPUTED]  # as results have it
            found = _best_of_kinds(document["results"], places, mean_psnr)
            cells += [
                (named(document), f"{n}", *line) for n, line in zip(COMPUTED, found, strict=True)
            ]
    heads = ("run", "computed steps", AUTO, *KINDS)
    return Table("PSNR in dB to the uncached run, at equal numbers of computed steps", heads, cells)


def time_table(documents: Sequence[Document]) -> Table:
    """PSNR in dB at `pareto_report.SPEEDUPS` times the measured speed of the uncached run, of Auto
    and of the best of each kind with the best of its settings; of the runs that were timed."""
    cells = []
    for document in documents:
        results = document["results"]
        if timed(results):
            places = seconds_at_speedups(results)
            found = _best_of_kinds(results, places, mean_psnr, axis=seconds)
            cells += [
                (named(document), f"{x:g}x", *line) for x, line in zip(SPEEDUPS, found, strict=True)
            ]
    heads = ("run", "speed", AUTO, *KINDS)
    return Table("PSNR in dB to the uncached run, at equal time", heads, cells)


def _best_of_kinds(
    results: Sequence[Document],
    places: Sequence[float],
    value: Callable[[Document], float],
    axis: Callable[[Document], float] = compute,
) -> list[list[str]]:
    """At each place on the axis: Auto's value, and of each kind the highest."""
    found = {}
    for name, rows in by_method(results).items():
        curve = points(rows, value, axis)
        curve = curve if name == AUTO else best_up_to(curve)
        found[name] = [interpolate(curve, place) for place in places]
    lines = []
    for i in range(len(places)):
        values = [found[AUTO][i]]
        for belongs in KINDS.values():
            of_kind = [each[i] for name, each in found.items() if belongs(name)]
            values.append(max(filter(None, of_kind), default=None))
        lines.append([number(x, 1) for x in values])
    return lines


def corrections_table(documents: Sequence[Document]) -> Table:
    """PSNR in dB to the uncached run of every base method without and with AdaCorrection.

    Runs that had none of them are left out.
    """
    names = [name + suffix for name in METHODS if name != AUTO for suffix in ("", CORRECTED)]
    cells = []
    for document in documents:
        values = {
            (entry["cache_method"], entry["at"]): entry["value"]
            for entry in document["at_fractions"]
            if entry["quantity"] == "psnr"
        }
        if not {name for name, _ in values}.intersection(names):
            continue
        for at in FRACTIONS:
            numbers = [number(values.get((name, at)), 1) for name in names]
            cells.append((named(document), f"{at}", *numbers))
    heads = ("run", "compute", *names)
    return Table("Base methods, and what AdaCorrection makes of them", heads, cells)


def _gain(rival: Document | None) -> str:
    gain = rival and rival["auto_gains"]
    if gain is None:
        return MISSING
    text = number(gain["value"], 1, signed=True)
    return f"({text})" if gain["low"] <= 0 <= gain["high"] else text


def draw(path: Path, documents: Sequence[Document]) -> None:
    """PSNR to the uncached run over total compute, a panel a run: Auto, the best of each kind."""
    columns = min(3, len(documents))
    lines = -(-len(documents) // columns)
    size = (4.6 * columns, 3.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(documents) :]:
        axis.remove()
    for axis, document in zip(axes.flat, documents, strict=False):
        methods = by_method(document["results"])
        own = within_shown(points(methods[AUTO], mean_psnr))
        axis.plot(*zip(*own, strict=True), ".-", color="black", lw=2.2)
        for index, belongs in enumerate(KINDS.values()):
            rows = [row for name in methods if belongs(name) for row in methods[name]]
            best_ones = upper_envelope(within_shown(points(rows, mean_psnr)))
            if best_ones:
                axis.plot(*zip(*best_ones, strict=True), ".-", color=f"C{index}", lw=1.2)
        axis.set(title=named(document), xlabel="compute fraction")
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("PSNR to uncached (dB)")
    figure.tight_layout()
    colours = ["black", *(f"C{index}" for index in range(len(KINDS)))]
    handles = [plt.Line2D([], [], color=colour) for colour in colours]
    figure.legend(handles, [AUTO, *KINDS], ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def mean_psnr(row: Document) -> float:
    return row["psnr_db"]["mean"]


def median_psnr(row: Document) -> float:
    return median(row["psnr_per_picture"])


def points(
    rows: Sequence[Document],
    value: Callable[[Document], float],
    axis: Callable[[Document], float] = compute,
) -> Curve:
    """(axis, value) of the rows that differ from the uncached run, the axis rising."""
    return sorted((axis(row), value(row)) for row in rows if row["psnr_db"])


def within_shown(curve: Curve) -> Curve:
    return [point for point in curve if SHOWN[0] <= point[0] <= SHOWN[1]]


def upper_envelope(curve: Curve) -> Curve:
    """The points that no other one beats further to the left."""
    return unbeaten(curve, lambda point: point[0], lambda point: point[1])


def best_up_to(curve: Curve) -> Curve:
    """The `upper_envelope`; what more compute does not improve stays as it is."""
    kept = upper_envelope(curve)
    return [*kept, (curve[-1][0], kept[-1][1])] if curve and curve[-1][0] > kept[-1][0] else kept


def put_tables(page: Path, documents: Sequence[Document]) -> None:
    """Put the six tables between their markers."""
    for quantity in TITLES:
        put_between(page, f"pareto {quantity}", summary_table(documents, quantity).markdown())
    put_between(page, "pareto median", median_table(documents).markdown())
    put_between(page, "pareto computed steps", computed_steps_table(documents).markdown())
    put_between(page, "pareto corrections", corrections_table(documents).markdown())
    timed_runs = time_table(documents)
    text = timed_runs.markdown() if timed_runs.cells else "No run was timed (`--latency`).\n"
    put_between(page, "pareto time", text)


def update_results(page: Path, directory: Path) -> None:
    """Draw the figure beside the results, and put the tables into the page."""
    documents = read_documents(directory)
    put_tables(page, documents)
    with whole_file(directory / FIGURE) as temporary:
        draw(temporary, documents)
