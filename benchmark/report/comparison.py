"""Gathers rows into ``results.json`` and writes ``report.md`` from it."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmark.models.families import FAMILIES
from benchmark.models.loading import default_device
from benchmark.report.machine import processor
from benchmark.report.page import bullets, listed, section
from benchmark.report.plots import draw_comparison, draw_quality
from benchmark.report.tables import (
    Table,
    comparison_tables,
    interpolated_tables,
    sweep_tables,
)
from benchmark.run.rows import Row
from benchmark.run.store import Store, write_json, write_text
from benchmark.run.workbench import TIMED_PROMPTS, Workbench, latency_fields, threads
from benchmark.score.clips import DIFFERENCE_RANGE
from benchmark.score.curves import interpolated_table
from benchmark.score.pictures import PSNR_CAP_DB
from benchmark.score.scoring import describe_distance
from xfuser_adacorr import __version__


def environment(bench: Workbench) -> dict[str, Any]:
    """Machine and versions; no dates, no host names."""
    packages = ("torch", "diffusers", "transformers", "torchmetrics", "numpy")
    device = default_device(bench.settings)
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "xfuser_adacorr": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": device,
        "threads": threads(bench.settings),
    }


def gather(
    bench: Workbench, rows: Sequence[Row], seconds: Mapping[str, list[float]] | None
) -> dict[str, Any]:
    """The content of ``results.json``: kept rows, with latencies where they were measured."""
    results = []
    for row in rows:
        result = {"key": row.key, **bench.store.row(row.key)}
        timing: dict[str, Any] = {"latency_s": None, "fps": None, "speedup": None}
        if seconds is not None:
            uncached = seconds[bench.uncached_row(row.reference_steps).key]
            timing = latency_fields(seconds[row.key], uncached)
        results.append({**result, **timing})
    height, width = bench.shape
    document = {
        "schema": 1,
        "environment": environment(bench),
        "settings": {**bench.settings.to_dict(), "height": height, "width": width},
        "distance": describe_distance(bench.settings, bench.scorer),
        "prompts": bench.entries,
        "results": results,
    }
    if bench.settings.mode == "sweep":
        document["interpolated"] = interpolated_table(results)
    return document


def write_results(store: Store, document: Mapping[str, Any]) -> list[Table]:
    """Write figures, ``report.md`` and ``results.json``; returns the tables worth printing."""
    mode = document["settings"]["mode"]
    results = document["results"]
    figures = draw_quality(store, document) if mode != "gamma_lambda" else {}
    further: list[Table] = []
    if mode == "comparison":
        tables = comparison_tables(results)
        figures |= draw_comparison(store, document)
    elif mode == "sweep":
        tables = interpolated_tables(document["interpolated"])
        further = sweep_tables(results)
    else:
        tables = sweep_tables(results)
    write_text(store.report, render(document, tables, figures, further))
    write_json(store.results, document)
    return tables


TITLES = {
    "comparison": "Cache methods compared",
    "sweep": "Cache methods over compute",
    "gamma_lambda": "Sensitivity to gamma and lambda",
}


def write_study(
    store: Store, document: Mapping[str, Any], report: str, tables: Sequence[Table], console: Any
) -> None:
    """Write a study's ``results.json`` and ``report.md``, and show its tables."""
    write_text(store.report, report)
    write_json(store.results, document)
    for table in tables:
        console.print(table.rich())
    console.print(f"Report: {store.report}", soft_wrap=True)


def render(
    document: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, str],
    further: Sequence[Table] = (),
) -> str:
    """The report as markdown."""
    mode = document["settings"]["mode"]
    parts = [f"# {TITLES[mode]}\n", _introduction(document)]
    parts += map(section, tables)
    parts += ["## How it was measured\n", _method(document)]
    for text, path in figures.items():
        parts += [f"## {text[0].upper()}{text[1:]}\n", f"![{text}]({path})\n"]
    parts += map(section, further)
    return "\n".join(parts)


def _introduction(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    shipped = (
        Path(settings["model"]).name if Path(settings["model"]).is_dir() else settings["model"]
    )
    count, frames = len(document["prompts"]), settings["num_frames"]
    return (
        f"Model `{shipped}` ({settings['model_type']}), {settings['width']}x{settings['height']} "
        f"pixels, {f'{frames} frames, ' if frames else ''}{count} prompt"
        f"{'s' if count > 1 else ''} of the {settings['split']} split with "
        f"one seed each, {settings['dtype']}"
        + (
            f", true CFG scale {settings['true_cfg_scale']:g}"
            if settings["true_cfg_scale"] > 1
            else ""
        )
        + (
            f", guidance scale {settings['guidance_scale']:g} in a doubled batch"
            if (settings["guidance_scale"] or 1) > 1
            else ""
        )
        + ".\n"
    )


def _method(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    family, frames = FAMILIES[settings["model_type"]], settings["num_frames"]
    own, other = family.solvers
    what = "clip, mean over its frames," if frames else "picture,"
    lines = [
        "Compute fraction: FLOPs executed in the denoiser's calls, embedders and head included, "
        "over those of the uncached run, counted in every row (under torchrun the share of the "
        "computed calls, or of the steps). Hit rate: share of the reused steps, as the package's "
        "summary says.",
        f"PSNR: each {what} as floats in [0, 1], against the uncached one of the same "
        "prompt, seed and step count; mean ± standard deviation (minimum) over the prompts. "
        f"Identical pictures count as {PSNR_CAP_DB:g} dB, which is also the cap.",
        f"{'FID' if settings['inception_weights'] else 'Judge distance'}: {document['distance']}. "
        f"It depends on the number of pictures ({len(document['prompts'])} here): compare rows of "
        "this report only.",
        "Prompt accuracy: share of pictures in which the classifier finds everything the prompt "
        "names.",
        f"Fewer steps: the same pipeline without a cache and with fewer steps, by its own solver "
        f"({own}) and by {other} ({family.solvers_note}).",
    ]
    if frames:
        lines.append(
            "Worst frame: the mean over the clips of each clip's worst frame. Temporal PSNR: frame "
            f"differences x[t+1] - x[t] against the uncached clip's, for a range of "
            f"{DIFFERENCE_RANGE:g} since they lie in [-1, 1]."
        )
    if settings["ode_reference"]:
        start = (
            ", which starts where the uncached run of the same step count does"
            if family.ode.per_step_count
            else ""
        )
        lines.append(
            f"PSNR to ODE: against {family.ode.solver} with {family.ode.steps} uncached steps, "
            f"a stand-in for the exact solution of the sampling ODE{start}."
        )
    if settings["mode"] == "comparison":
        timed = min(TIMED_PROMPTS, len(document["prompts"]))
        lines.append(
            f"Latency: the whole pipeline call for one {'clip' if frames else 'picture'}, batch 1; "
            f"median (minimum-maximum) of {settings['repetitions']} rounds over all rows in turn "
            f"with {timed} prompts each, after {settings['warmup']} untimed rounds. "
            "Speedup: quotient of the medians of the same run. Cache: most bytes of tensors held "
            "at once."
        )
    return bullets([*lines, f"Environment: {listed(document['environment'])}."])
