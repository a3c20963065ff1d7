"""The table over model families, gathered from the results of their runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.errors import BenchmarkError
from benchmark.models.names import CORRECTED, UNCACHED
from benchmark.report.markers import put_between
from benchmark.report.plots import plt
from benchmark.report.reading import read_results
from benchmark.report.tables import DISTANCE_COLUMNS, MISSING, Result, Table, label, number
from benchmark.run.store import whole_file, write_json, write_text
from benchmark.score.scoring import DISTANCES

MARKER = "cross-model table"
FIGURE = "psnr.png"

_KEPT = (
    "fps",
    "speedup",
    "hit_rate",
    "compute_fraction",
    "ssim",
    "prompt_accuracy",
    "prompt_accuracy_error",
    "config",
)
_MEANS = ("psnr_db", "temporal_psnr_db")


def gather(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``cross_model.json``, from the families' ``results.json``."""
    return {"schema": 1, "families": {name: _family(doc) for name, doc in documents.items()}}


def _family(document: Mapping[str, Any]) -> dict[str, Any]:
    settings = document["settings"]
    named = ("model", "config", "width", "height", "dtype", "split", "repetitions", "warmup")
    guidance = settings.get("guidance_scale")
    return {
        **{name: settings[name] for name in named},
        **({} if guidance is None else {"guidance_scale": guidance}),
        "steps": settings["num_inference_steps"][0],
        "number": len(document["prompts"]),
        "clips": any("temporal_psnr_db" in result for result in document["results"]),
        "distance": document["distance"],
        "environment": document["environment"],
        "rows": [_row(result) for result in _shown(document["results"])],
    }


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


def _row(result: Result) -> dict[str, Any]:
    means = {name: result[name] and result[name]["mean"] for name in _MEANS if name in result}
    distances = {name: result[name] for name in DISTANCES if name in result}
    return {"method": label(result), **{n: result[n] for n in _KEPT}, **distances, **means}


_COLUMNS = {
    **DISTANCE_COLUMNS,
    "FPS": lambda r: number(r["fps"], 3),
    "speedup": lambda r: number(r["speedup"], 2) + "x",
    "HR": lambda r: number(r["hit_rate"], 3),
    "compute": lambda r: number(r["compute_fraction"], 3),
    "PSNR dB": lambda r: number(r["psnr_db"], 1),
    "SSIM": lambda r: number(r["ssim"], 4),
    "temporal PSNR dB": lambda r: number(r.get("temporal_psnr_db"), 1),
    "prompt accuracy": lambda r: number(r["prompt_accuracy"], 3),
}


def make_table(document: Mapping[str, Any]) -> Table:
    """All families below each other; a family is named in its first line."""
    columns = dict(_COLUMNS)
    rows = [row for family in document["families"].values() for row in family["rows"]]
    for head in (*DISTANCE_COLUMNS, "temporal PSNR dB"):
        if all(columns[head](row) == MISSING for row in rows):
            del columns[head]
    cells = []
    for name, family in document["families"].items():
        for index, row in enumerate(family["rows"]):
            named = "" if index else f"{name}, {family['steps']} steps"
            cells.append((named, row["method"], *(cell(row) for cell in columns.values())))
    return Table("All model families", ("family", "method", *columns), cells)


def write_report(folder: Path, document: Mapping[str, Any]) -> Table:
    """Write ``cross_model.json``, ``cross_model.md`` and the figure; returns the table."""
    table = make_table(document)
    with whole_file(folder / FIGURE) as temporary:
        draw(temporary, document)
    write_text(folder / "cross_model.md", render(document, table))
    write_json(folder / "cross_model.json", document)
    return table


def render(document: Mapping[str, Any], table: Table) -> str:
    """The report as markdown."""
    return "\n".join(
        [
            "# Cache methods on all model families\n",
            table.markdown(),
            f"![PSNR over compute fraction]({FIGURE})\n",
            "## How it was measured\n",
            _method(document),
        ]
    )


def _method(document: Mapping[str, Any]) -> str:
    families = document["families"]
    configs = ", ".join(f"`{family['config']}`" for family in families.values())
    lines = [_introduction(name, family) for name, family in families.items()]
    lines += [
        f"Methods have the options of {configs}; rows of one family differ in compute. Below them "
        "stand the solvers with as few uncached steps as come nearest to the compute of `Auto`.",
        "FPS: pictures a second, of clips clips a second: the whole pipeline call, one prompt at a "
        "time, from the median latency of interleaved rounds over all rows. Speedup: FPS over that "
        "of the uncached row. Each family was timed in a run of its own: FPS and speedup are "
        "comparable within a family, not from one family to another.",
        "HR: cache hit rate, the share of the reused steps. Compute: FLOPs executed in the "
        "denoiser's calls over those of the uncached run.",
        "PSNR and SSIM: against the uncached picture of the same prompt and seed, mean over the "
        "prompts; of clips mean over the frames.",
        "The distance depends on the number of pictures and on the classifier: compare within a "
        "family.",
        "Prompt accuracy: share of pictures or clips in which the classifier finds everything "
        "that was asked for.",
    ]
    if any(family["clips"] for family in families.values()):
        lines.append(
            "Temporal PSNR: temporal consistency of clips, PSNR of the differences between "
            "neighbouring frames against those of the uncached clip; flicker lowers it."
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _introduction(name: str, family: Mapping[str, Any]) -> str:
    environment = ", ".join(f"{key} {value}" for key, value in family["environment"].items())
    guidance = family.get("guidance_scale")
    return (
        f"{name}: `{family['model']}`, {family['number']} "
        f"{'clips' if family['clips'] else 'pictures'} "
        f"of {family['width']}x{family['height']} pixels "
        f"of the {family['split']} split, {family['steps']} steps, {family['dtype']}"
        + ("" if guidance is None else f", guidance scale {guidance:g}")
        + f"; {family['repetitions']} timed rounds after {family['warmup']} untimed ones. "
        f"Distance: {family['distance']}. Environment: {environment}. "
        f"All rows: [{name}/report.md]({name}/report.md)."
    )


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """PSNR over compute fraction, a panel for each family; corrected methods are filled."""
    families = document["families"]
    size = (4.5 * len(families), 3.8)
    figure, axes = plt.subplots(1, len(families), figsize=size, squeeze=False)
    for axis, (name, family) in zip(axes[0], families.items(), strict=True):
        points = {
            row["method"]: (row["compute_fraction"], row["psnr_db"])
            for row in family["rows"]
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
        axis.set(title=f"{name}, {family['steps']} steps", xlabel="compute fraction")
        axis.grid(alpha=0.3)
        if points:
            axis.legend(fontsize=6)
    axes[0][0].set_ylabel("PSNR to uncached (dB)")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def update_results(page: Path, results: Path) -> None:
    """Put the table of ``cross_model.json`` between the markers of a page.

    Raises:
        BenchmarkError: there is no such file, or the markers are not there, in order.
    """
    if not results.is_file():
        raise BenchmarkError(f"--update_results: there is no {results}; run the comparison first")
    put_between(page, MARKER, make_table(read_results(results)).markdown())
