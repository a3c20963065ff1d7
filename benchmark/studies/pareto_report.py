"""What the Pareto command writes: results, tables of who wins by how much, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmark.models.names import LEARNED, LEARNING, UNCACHED
from benchmark.peers import is_peer
from benchmark.report.tables import MISSING, Table, number, sweep_tables
from benchmark.run.store import whole_file, write_json, write_text
from benchmark.score.bands import (
    CONFIDENCE,
    QUANTITIES,
    Point,
    Quantity,
    best_curve,
    compute,
    curve,
    point_at,
    seconds,
)
from benchmark.score.curves import FRACTIONS
from benchmark.score.samples import RESAMPLES

Result = Mapping[str, Any]
AUTO = "Auto"
"""The one method of ours that the others are set against."""


UNCACHED_RUN = "uncached"
SPEEDUPS = (2.0, 3.0, 4.0)
"""Of measured time over the uncached run, at which methods are compared where it was measured."""


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The rows of every method but the uncached one, in order of appearance."""
    names = dict.fromkeys(r["cache_method"] for r in results)
    return {n: [r for r in results if r["cache_method"] == n] for n in names if n != UNCACHED}


def uncached_point(results: Sequence[Result], quantity: Quantity) -> Point | None:
    """What the uncached run has of a quantity; None of those that compare with it."""
    points = curve([r for r in results if r["cache_method"] == UNCACHED], quantity)
    return points[0] if points else None


def method_curve(name: str, rows: Sequence[Result], quantity: Quantity, axis=compute) -> list:
    """Auto's curve as it is; of any other method the best of its settings at every compute."""
    return (curve if name == AUTO else best_curve)(rows, quantity, axis)


def at_fractions(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every method and quantity at `FRACTIONS` of the compute, with bands, and what Auto is
    better by: positive where Auto wins, whichever way the quantity goes."""
    entries = []
    for quantity in QUANTITIES:
        curves = {n: method_curve(n, rows, quantity) for n, rows in by_method(results).items()}
        if not any(curves.values()):
            continue
        for fraction in FRACTIONS:
            found = {name: point_at(points, fraction) for name, points in curves.items()}
            found[UNCACHED_RUN] = uncached_point(results, quantity)
            for name, point in found.items():
                entry = {"quantity": quantity.name, "at": fraction, "cache_method": name}
                entry |= _values(point, quantity)
                gain = None
                if name != AUTO and point is not None and found.get(AUTO) is not None:
                    ours = found[AUTO]
                    gain = ours.minus(point) if quantity.higher_is_better else point.minus(ours)
                entries.append({**entry, "auto_gains": gain and _values(gain, quantity)})
    return entries


def _values(point: Point | None, quantity: Quantity) -> dict[str, float | None]:
    if point is None:
        return {"value": None, "low": None, "high": None}
    low, high = point.band()
    digits = quantity.digits + 1
    return {
        "value": round(point.value, digits),
        "low": round(low, digits),
        "high": round(high, digits),
    }


def verdict(gain: Mapping[str, float]) -> str:
    """Who wins, if the band of the difference leaves no doubt."""
    if gain["low"] > 0:
        return AUTO
    return "rival" if gain["high"] < 0 else "even"


def best_rival(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of entries of one quantity and fraction the one that Auto gains least over.

    Learned plans are none: `Auto` follows them where there are any.
    """
    others = (UNCACHED_RUN, LEARNED, LEARNING)
    rivals = [e for e in entries if e["auto_gains"] and e["cache_method"] not in others]
    return min(rivals, key=lambda entry: entry["auto_gains"]["value"], default=None)


def _cell(values: Mapping[str, float | None] | None, digits: int, *, signed: bool = False) -> str:
    if values is None or values["value"] is None:
        return MISSING
    low, high = (number(values[end], digits, signed=signed) for end in ("low", "high"))
    return f"{number(values['value'], digits, signed=signed)} [{low}, {high}]"


def tables(entries: Sequence[Mapping[str, Any]], steps: int) -> list[Table]:
    """First Auto against the best of all others, then every method on every quantity."""
    heads = tuple(f"at {fraction}" for fraction in FRACTIONS)
    known = [q for q in QUANTITIES if any(e["quantity"] == q.name and e["value"] for e in entries)]
    title = f"{AUTO} against the best of all others, {steps} steps"
    whole, short = (
        [
            (quantity.title, *(_against_best(entries, quantity, f, short=s) for f in FRACTIONS))
            for quantity in known
        ]
        for s in (False, True)
    )
    made = [Table(title, ("", *heads), whole, Table(title, ("", *heads), short))]
    for quantity in known:
        names = dict.fromkeys(e["cache_method"] for e in entries)
        cells = []
        for name in names:
            own = [e for e in entries if e["cache_method"] == name]
            at = [next(e for e in own if _is(e, quantity, fraction)) for fraction in FRACTIONS]
            gains = [_cell(e["auto_gains"], quantity.digits, signed=True) for e in at]
            cells.append((name, *(_cell(e, quantity.digits) for e in at), *gains))
        gain_heads = tuple(f"{AUTO} gains {head}" for head in heads)
        title = f"{quantity.title}, {steps} steps"
        made.append(Table(title, ("method", *heads, *gain_heads), cells))
    return made


def seconds_at_speedups(results: Sequence[Result]) -> list[float]:
    """Seconds a picture at `SPEEDUPS` times the speed of the uncached run."""
    (uncached,) = (result for result in results if result["cache_method"] == UNCACHED)
    return [seconds(uncached) / speedup for speedup in SPEEDUPS]


def equal_time(results: Sequence[Result], steps: int) -> Table:
    """PSNR to the uncached run of every method where a picture takes as long as with the others."""
    quantity = QUANTITIES[0]
    places = seconds_at_speedups(results)
    rows = []
    for name, own in by_method(results).items():
        points = method_curve(name, own, quantity, seconds)
        found = [point_at(points, place) for place in places]
        cells = [point and _values(point, quantity) for point in found]
        rows.append((name, *(_cell(cell, quantity.digits) for cell in cells)))
    heads = (f"{speedup:g} times as fast" for speedup in SPEEDUPS)
    return Table(f"{quantity.title} at equal time, {steps} steps", ("method", *heads), rows)


def _against_best(
    entries: Sequence[Mapping[str, Any]], quantity: Quantity, fraction: float, *, short: bool
) -> str:
    """Who wins, by how much (with the band, if not short) and over whom."""
    rival = best_rival([e for e in entries if _is(e, quantity, fraction)])
    if rival is None:
        return MISSING
    gain = rival["auto_gains"]
    if short:
        by = number(gain["value"], quantity.digits, signed=True)
    else:
        by = _cell(gain, quantity.digits, signed=True)
    return f"{verdict(gain)}: {by} over {rival['cache_method']}"


def _is(entry: Mapping[str, Any], quantity: Quantity, fraction: float) -> bool:
    return entry["quantity"] == quantity.name and entry["at"] == fraction


def draw(path: Path, results: Sequence[Result], title: str, *, latency: bool = False) -> None:
    """A line of panels for every quantity: our methods and fewer steps, then other projects'."""
    methods = by_method(results)
    drawn = [q for q in QUANTITIES if any(curve(rows, q) for rows in methods.values())]
    figure, axes = plt.subplots(
        len(drawn), 2, figsize=(15, 4.6 * len(drawn)), squeeze=False, sharey="row"
    )
    axis, text = (seconds, "seconds a picture") if latency else (compute, "compute fraction")
    for line, quantity in zip(axes, drawn, strict=True):
        for panel, others in zip(line, (False, True), strict=True):
            shown = [n for n in methods if n == AUTO or is_peer(n) == others]
            for index, name in enumerate(sorted(shown, key=lambda n: n != AUTO)):
                points = method_curve(name, methods[name], quantity, axis)
                _draw_curve(panel, name, points, index)
            uncached = uncached_point(results, quantity)
            if uncached is not None:
                panel.axhline(uncached.value, color="0.5", linestyle=":", label=UNCACHED_RUN)
            panel.set(xlabel=text, title=f"{title}: {quantity.title}")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=6)
        line[0].set_ylabel(quantity.title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_curve(panel: Any, name: str, points: Sequence[Point], index: int) -> None:
    if not points:
        return
    x = [point.x for point in points]
    lows, highs = zip(*(point.band() for point in points), strict=True)
    colour = "black" if name == AUTO else plt.cm.tab20((index - 1) % 20)
    width = 2.2 if name == AUTO else 1.1
    values = [point.value for point in points]
    panel.plot(x, values, marker=".", color=colour, linewidth=width, label=name)
    panel.fill_between(x, lows, highs, color=colour, alpha=0.1, linewidth=0)


def _how(document: Mapping[str, Any]) -> str:
    tuning = document["tuning"]
    lines = [
        "Compute: FLOPs executed in the denoiser's calls (embedders, blocks, head) over "
        "those of the uncached run, counted in every row the same way.",
        f"{AUTO} is the documented method with its documented options, along its tolerance. Of "
        "every other method the best of its settings at each compute is taken, by PSNR to the "
        "uncached run on the very pictures that are scored: an advantage of theirs.",
        "Values between two rows are interpolated linearly; `-` is outside a method's range.",
        f"Brackets: {CONFIDENCE:.0%} bootstrap bands over the {len(document['prompts'])} pictures "
        f"({RESAMPLES} resamples, percentiles), of a difference on the same pictures in both "
        "methods. The best of several rivals is picked by its mean, which no band corrects for. "
        "Distances need many pictures; their bands are moved to the value, which resamples exceed.",
        f"Distance: {document['distance']}.",
        f"Tuned on {tuning['tuning_prompts']} development prompts: the schedules, by a search of "
        f"at most {tuning['search_evaluations']} evaluations each, and MagCache's ratios.",
        *_how_timed(document["results"]),
        *(f"Left out: {reason}." for reason in document["left_out"]),
        "Environment: " + ", ".join(f"{n} {v}" for n, v in document["environment"].items()) + ".",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _how_timed(results: Sequence[Result]) -> list[str]:
    if not timed(results):
        return []
    runs = results[0]["latency_s"]["runs"]
    return [
        f"Time: median of {runs} pictures of every row, made row by row in turn in one run; whole "
        "pipeline calls, text encoding and decoding included. The spread is in `latency_s`."
    ]


def timed(results: Sequence[Result]) -> bool:
    """Whether the run measured latency."""
    return all(result["latency_s"] for result in results)


def write_report(directory: Path, name: str, steps: int, document: dict[str, Any]) -> list[Table]:
    """Write ``NAME.json``, ``NAME.md`` and the figures; returns the tables worth printing."""
    results = document["results"]
    entries = at_fractions(results)
    shown = tables(entries, steps)
    figures = {"over compute": f"{name}.png"}
    if timed(results):
        shown.append(equal_time(results, steps))
        figures["over latency"] = f"{name}_latency.png"
    title = f"{document['settings']['model_type']}, {steps} steps"
    for text, path in figures.items():
        with whole_file(directory / path) as temporary:
            draw(temporary, results, title, latency=text == "over latency")
    parts = [f"# Quality over compute: {title}\n"]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in shown]
    parts += ["## How it was measured\n", _how(document)]
    parts += [f"## Quality {text}\n\n![{text}]({path})\n" for text, path in figures.items()]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in sweep_tables(results)]
    write_text(directory / f"{name}.md", "\n".join(parts))
    without = [{k: v for k, v in result.items() if k != "samples"} for result in results]
    write_json(
        directory / f"{name}.json", {**document, "results": without, "at_fractions": entries}
    )
    return shown[:1]
