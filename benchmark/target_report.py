"""How well targets are held and expectations met, picture by picture: figures, tables, report."""

import math
from collections.abc import Mapping, Sequence
from statistics import StatisticsError, correlation, fmean
from typing import Any

from benchmark.metrics import PSNR_CAP_DB
from benchmark.tables import MISSING, Table, number

Result = Mapping[str, Any]
"""Of one point: ``option`` and ``value``, and per picture ``compute_fraction``, ``psnr_db`` and
``expected_psnr_db`` (None where nothing was expected)."""

HELD_WITHIN = 0.03
"""Relative deviation from a compute target up to which it counts as held."""
MET_WITHIN = 1.5
"""Factor between expected and true error up to which an expectation counts as met."""


def pairs(results: Sequence[Result]) -> list[tuple[float, float]]:
    """(expected, true) PSNR in dB of all pictures that have both, without those at the cap."""
    both = [
        pair
        for result in results
        if result["expected_psnr_db"] is not None
        for pair in zip(result["expected_psnr_db"], result["psnr_db"], strict=True)
    ]
    return [pair for pair in both if max(pair) < PSNR_CAP_DB]


def agreement(points: Sequence[tuple[float, float]], spread_db: float) -> dict[str, Any]:
    """Of expected with true PSNR; deviations are expected minus true, in dB.

    The correlation is None for fewer than two different points.
    """
    missed = [expected - true for expected, true in points]
    try:
        r = correlation(*zip(*points, strict=True)) if points else None
    except StatisticsError:
        r = None
    return {
        "pictures": len(points),
        "correlation": r and round(r, 4),
        "mean_deviation_db": round(fmean(missed), 4) if missed else None,
        "mean_absolute_deviation_db": round(fmean(map(abs, missed)), 4) if missed else None,
        "within_spread": _share_within(missed, spread_db),
        "met": _share_within(missed, 20.0 * math.log10(MET_WITHIN)),
        "spread_db": spread_db,
    }


def _share_within(missed: Sequence[float], limit_db: float) -> float | None:
    return round(fmean(abs(x) <= limit_db for x in missed), 4) if missed else None


def agreements(results: Sequence[Result], spread_db: float) -> dict[str, dict[str, Any]]:
    """`agreement` for every option that expects something, and over all of them."""
    options = dict.fromkeys(r["option"] for r in results if r["expected_psnr_db"] is not None)
    found = {
        option: agreement(pairs([r for r in results if r["option"] == option]), spread_db)
        for option in options
    }
    return {**found, "all": agreement(pairs(results), spread_db)}


def off_target(result: Result) -> float | None:
    """Largest relative deviation of a picture's compute from the compute asked for, signed."""
    if result["option"] != "target_compute":
        return None
    off = [fraction / result["value"] - 1 for fraction in result["compute_fraction"]]
    return max(off, key=abs)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{fmean(values):.3f} ({low if low == high else f'{low}-{high}'})"


def _held(result: Result) -> str:
    off = off_target(result)
    if off is None:
        return MISSING
    return f"{off:+.1%}, {'held' if abs(off) <= HELD_WITHIN else 'not held'}"


def points_table(results: Sequence[Result]) -> Table:
    """One line a point."""
    heads = ("asked", "compute (range)", "largest deviation", "PSNR dB (least)", "expected dB")
    cells = [
        (
            f"{result['option']} {result['value']:g}",
            _range(result["compute_fraction"]),
            _held(result),
            f"{fmean(result['psnr_db']):.1f} ({min(result['psnr_db']):.1f})",
            number(result["expected_psnr_db"] and fmean(result["expected_psnr_db"]), 1),
        )
        for result in results
    ]
    return Table("Targets and tolerances", heads, cells)


def agreement_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line an option."""
    heads = (
        "points",
        "pictures",
        "correlation",
        "mean deviation dB",
        "mean absolute deviation dB",
        "within spread",
        f"within a factor of {MET_WITHIN}",
    )
    cells = [
        (
            name,
            str(entry["pictures"]),
            number(entry["correlation"], 3),
            number(entry["mean_deviation_db"], 1, signed=True),
            number(entry["mean_absolute_deviation_db"], 1),
            *(MISSING if entry[n] is None else f"{entry[n]:.0%}" for n in ("within_spread", "met")),
        )
        for name, entry in found.items()
    ]
    return Table("Expected against true PSNR", heads, cells)


def render(document: Mapping[str, Any], figure: str) -> str:
    """The report as markdown."""
    settings, calibration = document["settings"], document["calibration"]
    environment = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    relation, spread = calibration["psnr"], calibration["settings"]["spread_db"]
    guidance = settings["guidance_scale"]
    points, agreed = points_table(document["results"]), agreement_table(document["agreement"])
    return (
        f"# Targets of `Auto`\n\nModel `{settings['model']}`, {len(document['prompts'])} prompts "
        f"of the {settings['split']} split, {settings['num_inference_steps'][0]} steps"
        f"{'' if guidance is None else f', guidance {guidance:g}'}. Calibrated on development "
        f"prompts: `PSNR = {relation['at_one']:.1f} - {relation['slope']:.1f} log10(E)`, spread "
        f"{spread:.1f} dB.\n\n{points.markdown()}\n"
        f"- compute: mean and range over the pictures. Largest deviation: of any picture from the "
        f"compute asked for; held is within {HELD_WITHIN:.0%}. A run has whole calls alone, so the "
        "nearest number of calls can be further away.\n"
        "- PSNR: against the uncached picture (of clips the mean over frames), mean and least "
        "over the pictures. Expected: `expected_psnr_db` of the summary, which a tolerance alone "
        "does not have.\n\n"
        f"## {agreed.title}\n\n{agreed.markdown()}\n"
        "- Deviation: expected minus true, picture by picture. Pictures that are the same as the "
        "uncached one are left out. A factor of the error (the root of the mean square) of "
        f"{MET_WITHIN} is {20.0 * math.log10(MET_WITHIN):.1f} dB.\n\n"
        f"![Expected against true PSNR]({figure})\n\n"
        f"- One point a picture; the line is where both are equal, the band the calibration's "
        f"spread.\n- Environment: {environment}.\n"
    )
