"""What the visits of the GPU figures add up to: quartiles, shares, and the table."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median, quantiles
from typing import Any

import torch

from benchmark.gpu.rows import UNCACHED
from benchmark.report.machine import processor

PACKAGES = ("torch", "diffusers", "xfuser", "cache-dit", "triton")
MIB = 2**20


def machine(device: torch.device) -> dict[str, Any]:
    """GPU, driver, CPU and versions; no dates, no host names."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return described


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def quartiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Quartiles in milliseconds and the number of calls; None of none."""
    if not seconds:
        return None
    if len(seconds) == 1:
        low = middle = high = seconds[0]
    else:
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
    named = {"q1": low, "median": middle, "q3": high}
    return {name: round(1e3 * value, 4) for name, value in named.items()} | {"calls": len(seconds)}


def summarise(entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one model in one mode, in their order; one with an error has nothing else."""
    uncached = entries[UNCACHED]
    return [_row(name, entry, uncached) for name, entry in entries.items()]


def _row(name: str, entry: dict[str, Any], uncached: dict[str, Any]) -> dict[str, Any]:
    if "error" in entry:
        return {"cache_method": name, "error": entry["error"]}
    if not entry["rounds"]:
        return {"cache_method": name, "error": "not yet measured"}
    probe, rounds = entry["probe"], entry["rounds"]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for each in rounds:
        computed = each["computed"] or probe["computed"]
        for was_computed, s in zip(computed, each["seconds"], strict=True):
            seconds[was_computed].append(s)
    full = median(s for each in uncached["rounds"] for s in each["seconds"])
    generation = median(each["generation_s"] for each in rounds)
    reused, reads = seconds[False], probe["host_synchronisations"]
    return {
        "cache_method": name,
        "calls": len(probe["computed"]),
        "computed_calls": sum(probe["computed"]),
        "computed_call_ms": quartiles_ms(seconds[True]),
        "reused_call_ms": quartiles_ms(reused),
        "reused_share_of_full_call": round(median(reused) / full, 6) if reused else None,
        "generation_s": round(generation, 6),
        "speedup": round(median(r["generation_s"] for r in uncached["rounds"]) / generation, 4),
        "host_synchronisations": {
            kind: _spread([n for n, c in zip(reads, probe["computed"], strict=True) if c == which])
            for kind, which in (("computed", True), ("reused", False))
        },
        "peak_memory_added_bytes": _added(probe, uncached["probe"]),
        "cache_memory_bytes": probe["cache_memory_bytes"],
        "graphs": entry["warm_up"]["graphs"],
        "graph_breaks": entry["warm_up"]["graph_breaks"],
        "recompiles_while_timed": sum(each["graphs"] for each in rounds),
    }


def _spread(counts: Sequence[int]) -> dict[str, float] | None:
    return {"median": median(counts), "max": max(counts)} if counts else None


def _added(probe: dict[str, Any], uncached: dict[str, Any]) -> int | None:
    if probe["peak_bytes"] is None:
        return None
    return probe["peak_bytes"] - uncached["peak_bytes"]


COLUMNS = (
    "method",
    "computed / calls",
    "computed call ms",
    "reused call ms (quartiles)",
    "of a full call",
    "generation s",
    "speedup",
    "host syncs: computed, reused",
    "memory added MiB",
    "cache MiB",
    "graphs, breaks, recompiles",
)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines; rows that could not be measured follow the table with their error."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if "error" not in row:
            lines.append("| " + " | ".join(_cells(row)) + " |")
    failed = [f"- {row['cache_method']}: {row['error']}" for row in rows if "error" in row]
    return [*lines, "", *(["Not measured:", "", *failed, ""] if failed else [])]


def _cells(row: dict[str, Any]) -> list[str]:
    computed, reused = row["computed_call_ms"], row["reused_call_ms"]
    share, syncs = row["reused_share_of_full_call"], row["host_synchronisations"]
    return [
        row["cache_method"],
        f"{row['computed_calls']} / {row['calls']}",
        f"{computed['median']:.3g}" if computed else "-",
        f"{reused['median']:.3g} ({reused['q1']:.3g} to {reused['q3']:.3g})" if reused else "-",
        "-" if share is None else f"{100 * share:.2f} %",
        f"{row['generation_s']:.3f}",
        f"{row['speedup']:.2f}",
        ", ".join(_syncs(syncs[kind]) for kind in ("computed", "reused")),
        _mib(row["peak_memory_added_bytes"]),
        _mib(row["cache_memory_bytes"]),
        f"{row['graphs']}, {row['graph_breaks']}, {row['recompiles_while_timed']}",
    ]


def _syncs(counts: dict[str, float] | None) -> str:
    return "-" if counts is None else f"{counts['median']:g} (max {counts['max']})"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.2f}"


def report(document: dict[str, Any]) -> str:
    """All tables as markdown, below the machine and the settings."""
    settings = document["settings"]
    described = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    lines = ["# Speed and memory" + (": a dry run of tiny models" if settings["dry_run"] else "")]
    lines += ["", f"Machine: {described}.", ""]
    lines += [
        f"{settings['steps']} steps, of which caches that can compute the first "
        f"{settings['computed_steps']}; {settings['dtype']}. How to read it: docs/gpu.md.",
        "",
    ]
    for result in document["results"]:
        lines += [f"## {result['model']}, {result['mode']}", "", *table(result["rows"])]
    return "\n".join(lines)
