"""The table over model families, from the results of their runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.names import CORRECTED, UNCACHED
from benchmark.report.markers import put_between
from benchmark.report.page import bullets, listed
from benchmark.report.plots import plt
from benchmark.report.reading import read_results
from benchmark.report.tables import DISTANCE_COLUMNS, MISSING, Result, Table, label, number
from benchmark.run.store import whole_file, write_text

MARKER = "cross-model table"
FIGURE = "psnr.png"

Documents = Mapping[str, Mapping[str, Any]]
"""Family -> its ``results.json``."""


def read_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of all families below a folder; `BenchmarkError` if there are none."""
    paths = {name: folder / name / "results.json" for name in FAMILIES}
    found = {name: read_results(path) for name, path in paths.items() if path.is_file()}
    if not found:
        raise BenchmarkError(f"there is no FAMILY/results.json in {folder}: run the study first")
    return found


def _shown(results: Sequence[Result]) -> list[Result]:
    """Uncached, every cached row, and each solver's fewer steps at the compute of ``Auto``."""
    fewer = [r for r in results if r["config"] is None and r["cache_method"] != UNCACHED]
    shown = [result for result in results if result not in fewer]
    auto = next((r["compute_fraction"] for r in results if r["cache_method"] == "Auto"), None)
    if auto is None:
        return shown
    for solver in dict.fromkeys(result["solver"] for result in fewer):
        own = [result for result in fewer if result["solver"] == solver]
        shown.append(min(own, key=lambda result: abs(result["compute_fraction"] - auto)))
    return shown


_COLUMNS = {
    **DISTANCE_COLUMNS,
    "FPS": lambda r: number(r["fps"], 3),
    "speedup": lambda r: number(r["speedup"], 2) + "x",
    "HR": lambda r: number(r["hit_rate"], 3),
    "compute": lambda r: number(r["compute_fraction"], 3),
    "PSNR dB": lambda r: number(_mean(r["psnr_db"]), 1),
    "SSIM": lambda r: number(r["ssim"], 4),
    "temporal PSNR dB": lambda r: number(_mean(r.get("temporal_psnr_db")), 1),
    "prompt accuracy": lambda r: number(r["prompt_accuracy"], 3),
}


def _mean(spread: Mapping[str, float] | None) -> float | None:
    return spread and spread["mean"]


def _steps(document: Mapping[str, Any]) -> int:
    return document["settings"]["num_inference_steps"][0]


def _makes_clips(document: Mapping[str, Any]) -> bool:
    return any("temporal_psnr_db" in result for result in document["results"])


def make_table(documents: Documents) -> Table:
    """All families below each other; a family is named in its first line."""
    columns, shown = dict(_COLUMNS), {n: _shown(d["results"]) for n, d in documents.items()}
    for head in (*DISTANCE_COLUMNS, "temporal PSNR dB"):
        if all(columns[head](row) == MISSING for rows in shown.values() for row in rows):
            del columns[head]
    cells = []
    for name, rows in shown.items():
        for index, row in enumerate(rows):
            named = "" if index else f"{name}, {_steps(documents[name])} steps"
            cells.append((named, label(row), *(cell(row) for cell in columns.values())))
    return Table("All model families", ("family", "method", *columns), cells)


def write_report(folder: Path, documents: Documents) -> Table:
    """Write ``cross_model.md`` and the figure; returns the table."""
    table = make_table(documents)
    with whole_file(folder / FIGURE) as temporary:
        draw(temporary, documents)
    write_text(folder / "cross_model.md", render(documents, table))
    return table


def render(documents: Documents, table: Table) -> str:
    """The report as markdown."""
    return "\n".join(
        [
            "# Cache methods on all model families\n",
            table.markdown(),
            f"![PSNR over compute fraction]({FIGURE})\n",
            "## How it was measured\n",
            _method(documents),
        ]
    )


def _method(documents: Documents) -> str:
    configs = ", ".join(f"`{each['settings']['config']}`" for each in documents.values())
    lines = [_introduction(name, document) for name, document in documents.items()]
    lines += [
        f"Methods have the options of {configs}; rows of one family differ in compute. Below them "
        "stand the solvers with as few uncached steps as come nearest to the compute of `Auto`.",
        "FPS: pictures a second, of clips clips a second: the whole pipeline call, one prompt at a "
        "time, from the median latency of interleaved rounds over all rows. Speedup: FPS over that "
        "of the uncached row. Each family was timed in a run of its own: FPS and speedup are "
        "comparable within a family, not from one family to another.",
        "HR: cache hit rate, as the package's summary says. Compute: FLOPs executed in the "
        "denoiser's calls over those of the uncached run.",
        "PSNR and SSIM: against the uncached picture of the same prompt and seed, mean over the "
        "prompts; of clips mean over the frames.",
        "The distance depends on the number of pictures and on the classifier: compare within a "
        "family.",
        "Prompt accuracy: share of pictures or clips in which the classifier finds everything "
        "that was asked for.",
    ]
    if any(map(_makes_clips, documents.values())):
        lines.append(
            "Temporal PSNR: temporal consistency of clips, PSNR of the differences between "
            "neighbouring frames against those of the uncached clip; flicker lowers it."
        )
    return bullets(lines)


def _introduction(name: str, document: Mapping[str, Any]) -> str:
    settings, what = document["settings"], "clips" if _makes_clips(document) else "pictures"
    guidance = settings.get("guidance_scale")
    return (
        f"{name}: `{settings['model']}`, {len(document['prompts'])} {what} "
        f"of {settings['width']}x{settings['height']} pixels "
        f"of the {settings['split']} split, {_steps(document)} steps, {settings['dtype']}"
        + ("" if guidance is None else f", guidance scale {guidance:g}")
        + f"; {settings['repetitions']} timed rounds after {settings['warmup']} untimed ones. "
        f"Distance: {document['distance']}. Environment: {listed(document['environment'])}. "
        f"All rows: [{name}/report.md]({name}/report.md)."
    )


def draw(path: Path, documents: Documents) -> None:
    """PSNR over compute fraction, a panel for each family; corrected methods are filled."""
    size = (4.5 * len(documents), 3.8)
    figure, axes = plt.subplots(1, len(documents), figsize=size, squeeze=False)
    for axis, (name, document) in zip(axes[0], documents.items(), strict=True):
        points = {
            label(row): (row["compute_fraction"], _mean(row["psnr_db"]))
            for row in _shown(document["results"])
            if row["psnr_db"] is not None
        }
        bases = list(dict.fromkeys(method.removesuffix(CORRECTED) for method in points))
        for method, (compute, psnr) in points.items():
            base = method.removesuffix(CORRECTED)
            colour = f"C{bases.index(base) % 10}"
            corrected = method != base or method == "Auto"
            face = colour if corrected else "white"
            axis.plot(compute, psnr, "o", color=colour, markerfacecolor=face, label=method)
            if method != base and base in points:
                axis.plot(*zip(points[base], (compute, psnr), strict=True), color=colour, alpha=0.4)
        axis.set(title=f"{name}, {_steps(document)} steps", xlabel="compute fraction")
        axis.grid(alpha=0.3)
        if points:
            axis.legend(fontsize=6)
    axes[0][0].set_ylabel("PSNR to uncached (dB)")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def update_results(page: Path, folder: Path) -> None:
    """Put the table of a folder's results between the markers of a page.

    Raises:
        BenchmarkError: there are no results, or the markers are not there, in order.
    """
    put_between(page, MARKER, make_table(read_documents(folder)).markdown())
