"""The ablation study's variants at equal compute, what each part brings, and the report."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmark.report.page import page
from benchmark.report.tables import MISSING, Table, number
from benchmark.score.curves import at_equal_compute
from benchmark.score.pictures import spread
from benchmark.studies.ablation_variants import PARTS, VARIANTS

Rows = Sequence[Mapping[str, Any]]


def at_fractions(sweeps: Mapping[str, Rows], fractions: Sequence[float]) -> list[dict[str, Any]]:
    """One entry for every variant and compute fraction; PSNR is None where it is not reached."""
    entries = []
    for name, rows in sweeps.items():
        group = range(len(rows[0]["psnr_db"]))
        for fraction in fractions:
            found = at_equal_compute(rows, group, fraction)
            values = found and [round(value, 4) for value in found["psnr_db"]]
            entries.append(
                {
                    "variant": name,
                    "compute_fraction": fraction,
                    "psnr_db": values and spread(values),
                    "psnr_per_picture": values,
                }
            )
    return entries


def contributions(entries: Rows) -> list[dict[str, Any]]:
    """What each part brings whose variants are there: gain, its standard error, how many gain.

    The gain is the PSNR of the variant with the part less that of the one without it.
    """
    known = {(e["variant"], e["compute_fraction"]): e["psnr_per_picture"] for e in entries}
    found = []
    for part in PARTS:
        if not {part.present.name, part.absent.name} <= {name for name, _ in known}:
            continue
        for fraction in dict.fromkeys(entry["compute_fraction"] for entry in entries):
            present = known[part.present.name, fraction]
            absent = known[part.absent.name, fraction]
            entry: dict[str, Any] = {
                "part": part.name,
                "present": part.present.name,
                "absent": part.absent.name,
                "compute_fraction": fraction,
                "gain_db": None,
                "gain_error_db": None,
                "better": None,
                "number": None,
            }
            if present is not None and absent is not None:
                gains = [a - b for a, b in zip(present, absent, strict=True)]
                error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
                entry |= {
                    "gain_db": round(fmean(gains), 4),
                    "gain_error_db": round(error, 4),
                    "better": sum(gain > 0 for gain in gains),
                    "number": len(gains),
                }
            found.append(entry)
    return found


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The parts, the variants, and all rows."""
    return [
        _across("What each part brings, dB", "part", document["parts"], _gain),
        _across("PSNR of the variants, dB", "variant", document["variants"], _psnr),
        _rows_table(document["sweeps"]),
    ]


def _across(title: str, key: str, entries: Rows, cell: Any) -> Table:
    """One line a name, one column a compute fraction."""
    fractions = list(dict.fromkeys(entry["compute_fraction"] for entry in entries))
    cells = {(entry[key], entry["compute_fraction"]): cell(entry) for entry in entries}
    lines = [
        (name, *(cells[name, fraction] for fraction in fractions))
        for name in dict.fromkeys(entry[key] for entry in entries)
    ]
    return Table(title, (key, *(f"at {fraction}" for fraction in fractions)), lines)


def _gain(entry: Mapping[str, Any]) -> str:
    if entry["gain_db"] is None:
        return MISSING
    gain = number(entry["gain_db"], 1, signed=True)
    count = f"{entry['better']} of {entry['number']}"
    return f"{gain} ± {entry['gain_error_db']:.1f} ({count})"


def _psnr(entry: Mapping[str, Any]) -> str:
    value = entry["psnr_db"]
    if value is None:
        return MISSING
    return f"{value['mean']:.1f} ± {value['std']:.1f} (min {value['min']:.1f})"


def _rows_table(sweeps: Mapping[str, Rows]) -> Table:
    knobs = {variant.name: variant.knob for variant in VARIANTS}
    cells = []
    for name, rows in sweeps.items():
        for row in rows:
            value = row["config"][knobs[name]]
            shown = f"{len(value)} refreshes" if knobs[name] == "schedule" else f"{value:.4g}"
            means = (fmean(row["compute_fraction"]), fmean(row["psnr_db"]))
            cells.append((name, shown, f"{means[0]:.3f}", f"{means[1]:.2f}"))
    return Table("All rows", ("variant", "setting", "compute", "PSNR dB"), cells)


NOTES = (
    "PSNR against the uncached picture. Every variant was run with several settings of what sets "
    "its compute; each picture's PSNR was interpolated linearly to where the mean compute fraction "
    "over all pictures is the one given. - : not reached.",
    "Parts: PSNR with the part less PSNR without it, mean ± standard error over the same pictures, "
    "and how many of them gain. Variants: mean ± deviation over the pictures.",
    "Even: refreshes evenly spaced in the step index, the first and the last step among them. "
    "Auto: by its tolerance, with gamma = lambda = 1 unless said otherwise.",
    "No compensation, linear blend, last value and last call refreshed are no options of the "
    "package: the study replaces the part in the running program "
    "(`benchmark/studies/ablation_variants.py`).",
)


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    title = "What each part of AdaCorrection brings at equal compute"
    return page(document, title, tables(document), NOTES)
