"""Tables of results, written as markdown and printed on the console from one description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable

from benchmark.models.names import SCHEDULE, UNCACHED
from benchmark.score.curves import FRACTIONS
from benchmark.score.scoring import DISTANCES, FID, JUDGE_DISTANCE

Result = Mapping[str, Any]
MISSING = "-"
STUDIED = ("adacorr_gamma", "adacorr_lambda")
"""Options that are shown where they are not 1."""
DISTANCE_NAMES = {JUDGE_DISTANCE: "judge distance", FID: "FID"}


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column heads and cells of text."""

    title: str
    heads: tuple[str, ...]
    cells: list[tuple[str, ...]]
    short: "Table | None" = None
    """What the console shows instead, if this is too wide for it."""

    def markdown(self) -> str:
        alignment = ("---", *["---:"] * (len(self.heads) - 1))
        lines = [self.heads, alignment, *self.cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def rich(self) -> RichTable:
        shown = self.short or self
        table = RichTable(title=shown.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, head in enumerate(shown.heads):
            table.add_column(head, justify="right" if index else "left", no_wrap=True)
        for line in shown.cells:
            table.add_row(*line)
        return table


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    return MISSING if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def _spread(value: Mapping[str, float] | None) -> str:
    if value is None:
        return MISSING
    return f"{value['mean']:.1f} ± {value['std']:.1f} (min {value['min']:.1f})"


def _latency(value: Mapping[str, float] | None) -> str:
    if value is None:
        return MISSING
    return f"{value['median']:.3f} ({value['min']:.3f}-{value['max']:.3f})"


def _memory(value: int) -> str:
    return MISSING if not value else f"{value / 1024:.0f} KiB"


def label(result: Result) -> str:
    """The method's name; for fewer-steps rows with their number of steps."""
    if result["solver"] and result["config"] is None and result["cache_method"] != UNCACHED:
        return f"{result['solver']}, {result['num_inference_steps']} steps"
    return "uncached" if result["cache_method"] == UNCACHED else result["cache_method"]


def knob(result: Result) -> str:
    """The options of a row that a sweep varies."""
    config = result["config"]
    if config is None:
        return f"{result['num_inference_steps']} steps"
    if "peer" in config:
        options = {k: v for k, v in config["options"].items() if k != "mag_ratios"}
        return ", ".join(f"{name} {value}" for name, value in options.items())
    if config["use_cache"] == SCHEDULE:
        given = config["schedule"]
        return f"schedule {given if isinstance(given, int) else ' '.join(map(str, given or ()))}"
    names = ["rel_l1_thresh"] if config["use_cache"] != "Auto" else []
    if config["enable_adacorrection"] or config["use_cache"] == "Auto":
        names += ["adacorr_tolerance", *(n for n in STUDIED if config.get(n, 1.0) != 1.0)]
    return ", ".join(
        f"{name} {MISSING if config.get(name) is None else f'{config[name]:g}'}" for name in names
    )


DISTANCE_COLUMNS = {
    text: lambda r, name=name: number(r.get(name), 2) for name, text in DISTANCE_NAMES.items()
}
"""Title -> (row -> cell); rows have one of them."""


def _columns(results: Sequence[Result], *, latency: bool) -> dict[str, Any]:
    columns = {
        "compute": lambda r: number(r["compute_fraction"], 3),
        "hit rate": lambda r: number(r["hit_rate"], 3),
        "PSNR dB": lambda r: _spread(r["psnr_db"]),
        "PSNR to ODE dB": lambda r: _spread(r["psnr_ode_db"]),
        "worst frame PSNR dB": lambda r: _spread(r.get("worst_frame_psnr_db")),
        "temporal PSNR dB": lambda r: _spread(r.get("temporal_psnr_db")),
        "SSIM": lambda r: number(r["ssim"], 4),
        "worst frame SSIM": lambda r: number(r.get("worst_frame_ssim"), 4),
        "LPIPS": lambda r: number(r["lpips"], 4),
        **DISTANCE_COLUMNS,
        "prompt accuracy": lambda r: number(r["prompt_accuracy"], 3),
    }
    for head in columns.keys() - {"compute", "hit rate", "PSNR dB", "SSIM"}:
        if all(columns[head](result) == MISSING for result in results):
            del columns[head]
    if latency:
        clips = any("temporal_psnr_db" in result for result in results)
        columns[f"s / {'clip' if clips else 'picture'} (min-max)"] = lambda r: _latency(
            r["latency_s"]
        )
        columns["speedup"] = lambda r: number(r["speedup"], 2) + "x"
        columns["cache"] = lambda r: _memory(r["cache_memory_bytes"])
    return columns


def comparison_tables(results: Sequence[Result]) -> list[Table]:
    """One table a step count, uncached first."""

    def make(steps: int, rows: list[Result], columns: Mapping, short: Table | None) -> Table:
        cells = [(label(row), *(cell(row) for cell in columns.values())) for row in rows]
        return Table(f"{steps} steps", ("method", *columns), cells, short)

    return [
        make(steps, rows, _columns(results, latency=True), make(steps, rows, _SHORT, None))
        for steps, rows in by_steps(results)
    ]


_SHORT = {
    "compute": lambda r: number(r["compute_fraction"], 2),
    "PSNR dB": lambda r: number(r["psnr_db"] and r["psnr_db"]["mean"], 1),
    "SSIM": lambda r: number(r["ssim"], 4),
    "distance": lambda r: number(next((r[n] for n in DISTANCES if n in r), None), 2),
    "prompts": lambda r: number(r["prompt_accuracy"], 3),
    "s/picture": lambda r: number(r["latency_s"]["median"], 3),
    "speedup": lambda r: number(r["speedup"], 2) + "x",
}


def sweep_tables(results: Sequence[Result]) -> list[Table]:
    """All points of all curves, one table a step count."""
    tables = []
    columns = _columns(results, latency=False)
    for steps, rows in by_steps(results):
        cells = [(label(row), knob(row), *(cell(row) for cell in columns.values())) for row in rows]
        tables.append(Table(f"All rows, {steps} steps", ("method", "knob", *columns), cells))
    return tables


def interpolated_tables(table: Sequence[Result]) -> list[Table]:
    """Each quantity at the compute fractions, one table a step count."""
    heads = {
        "psnr_db": ("PSNR dB", 1),
        "psnr_ode_db": ("PSNR to ODE dB", 1),
        "temporal_psnr_db": ("temporal PSNR dB", 1),
        **{name: (text, 2) for name, text in DISTANCE_NAMES.items()},
        "prompt_accuracy": ("prompt accuracy", 3),
    }
    heads = {name: head for name, head in heads.items() if any(name in entry for entry in table)}
    tables = []
    for steps, entries in by_steps(table):
        cells = []
        for name in dict.fromkeys(entry["cache_method"] for entry in entries):
            own = [entry for entry in entries if entry["cache_method"] == name]
            texts = [
                " / ".join(number(entry[quantity], digits) for entry in own)
                for quantity, (_, digits) in heads.items()
            ]
            cells.append((name, *texts))
        title = f"{steps} steps, at compute fraction {' / '.join(map(str, FRACTIONS))}"
        tables.append(Table(title, ("method", *(head for head, _ in heads.values())), cells))
    return tables


def by_steps(results: Sequence[Result]) -> list[tuple[int, list[Result]]]:
    """Results grouped by the step count of their reference, in order of appearance."""
    counts = dict.fromkeys(result["reference_steps"] for result in results)
    return [(n, [r for r in results if r["reference_steps"] == n]) for n in counts]
