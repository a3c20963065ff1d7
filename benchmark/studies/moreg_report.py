"""What MoReg gains at equal compute, from per-clip compute fractions and PSNR of two sweeps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from benchmark.report.tables import MISSING, Table, number
from benchmark.score.curves import at_equal_compute

PLAIN, MOREG = "Ada", "Ada, MoReg"
EQUAL_AT = (0.35, 0.5)
"""Compute fractions at which the variants are compared."""

Clips = Mapping[str, Sequence[float]]
"""A row's per-clip values: ``compute_fraction`` and ``psnr_db``, a list each."""
Groups = Mapping[str, Sequence[int]]
"""Clips by their place: ``fast``, ``slow`` and ``all``."""


def motions(clips: Tensor) -> list[float]:
    """Mean absolute difference of neighbouring frames of each clip ``[N, F, 3, H, W]``."""
    return clips.diff(dim=1).abs().flatten(1).mean(dim=1).tolist()


def halves(motion: Sequence[float]) -> dict[str, list[int]]:
    """The clips with the most motion and the others, which are one more if their number is odd."""
    ordered = sorted(range(len(motion)), key=lambda clip: -motion[clip])
    middle = len(motion) // 2
    fast, slow = sorted(ordered[:middle]), sorted(ordered[middle:])
    return {"fast": fast, "slow": slow, "all": list(range(len(motion)))}


def compared(
    sweeps: Mapping[str, Sequence[Clips]], groups: Groups, equal: str, shown: Iterable[str]
) -> list[dict[str, Any]]:
    """Every variant and `PLAIN` at equal mean compute over the clips ``equal``, for each group of
    ``shown``.

    The gain is the variant's PSNR less that of `PLAIN`, mean and standard error over the same
    clips.
    """
    entries = []
    for variant in (name for name in sweeps if name != PLAIN):
        for fraction in EQUAL_AT:
            found = {
                name: at_equal_compute(sweeps[name], groups[equal], fraction)
                for name in (PLAIN, variant)
            }
            entries += [
                {"variant": variant, **_entry(found, groups[name], name, equal, fraction)}
                for name in shown
            ]
    return entries


def _entry(
    found: Mapping[str, Any], group: Sequence[int], name: str, equal: str, fraction: float
) -> dict[str, Any]:
    """``found`` holds `PLAIN` and one variant."""
    entry: dict[str, Any] = {"clips": name, "equal_over": equal, "fraction": fraction}
    own = {
        variant: values and {q: [values[q][clip] for clip in group] for q in values}
        for variant, values in found.items()
    }
    for quantity in ("compute_fraction", "psnr_db"):
        entry[quantity] = {v: values and fmean(values[quantity]) for v, values in own.items()}
    entry |= {"gain_db": None, "gain_error_db": None, "better": None, "number": len(group)}
    if all(own.values()):
        plain, variant = (values["psnr_db"] for values in own.values())
        gains = [b - a for a, b in zip(plain, variant, strict=True)]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        entry |= {"gain_db": fmean(gains), "gain_error_db": error}
        entry["better"] = sum(gain > 0 for gain in gains)
    return entry


def comparisons(sweeps: Mapping[str, Sequence[Clips]], groups: Groups) -> dict[str, Any]:
    """Both readings of equal compute."""
    return {
        "per_half": [
            entry for half in ("fast", "slow") for entry in compared(sweeps, groups, half, (half,))
        ],
        "over_all_clips": compared(sweeps, groups, "all", ("fast", "slow", "all")),
    }


# -- the report ----------------------------------------------------------------------------------

PER_HALF = "Equal compute per half"
OVER_ALL = "Equal mean compute over all clips"


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Both readings, the clips, and all rows."""
    return [
        _comparison_table(PER_HALF, document["per_half"]),
        _comparison_table(OVER_ALL, document["over_all_clips"]),
        _clips_table(document["clips"]),
        _rows_table(document),
    ]


def _comparison_table(title: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    heads = [f"{what}, {name}" for what in ("compute", "PSNR dB") for name in (PLAIN, "variant")]
    cells = [
        (
            entry["variant"],
            f"{entry['clips']}, {entry['equal_over']} at {entry['fraction']}",
            *(number(entry["compute_fraction"][name], 3) for name in (PLAIN, entry["variant"])),
            *(number(entry["psnr_db"][name], 2) for name in (PLAIN, entry["variant"])),
            _gain(entry),
            MISSING if entry["better"] is None else f"{entry['better']} of {entry['number']}",
        )
        for entry in entries
    ]
    heads = ("variant", "clips, equal over", *heads, "gain dB", "clips that gain")
    return Table(title, heads, cells)


def _gain(entry: Mapping[str, Any]) -> str:
    if entry["gain_db"] is None:
        return MISSING
    return f"{number(entry['gain_db'], 2, signed=True)} ± {number(entry['gain_error_db'], 2)}"


def _clips_table(clips: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for half in ("fast", "slow"):
        own = [clip["motion"] for clip in clips if clip["half"] == half]
        span = f"{min(own):.4f} to {max(own):.4f}" if own else MISSING
        cells.append((half, str(len(own)), number(fmean(own) if own else None, 4), span))
    return Table("Clips", ("half", "number", "mean motion", "from, to"), cells)


def _rows_table(document: Mapping[str, Any]) -> Table:
    half = [clip["half"] for clip in document["clips"]]
    groups = {
        name: [clip for clip, own in enumerate(half) if name in (own, "all")]
        for name in ("fast", "slow", "all")
    }
    cells = []
    for name, rows in document["sweeps"].items():
        for row in rows:
            means = [
                number(fmean(row[quantity][clip] for clip in clips), digits)
                for quantity, digits in (("compute_fraction", 3), ("psnr_db", 2))
                for clips in groups.values()
            ]
            cells.append((name, f"{row['rel_l1_thresh']:g}", *means))
    heads = [f"{what}, {name}" for what in ("compute", "PSNR dB") for name in groups]
    return Table("All rows", ("method", "rel_l1_thresh", *heads), cells)


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings = document["settings"]
    parts = [
        "# AdaCache with and without Motion Regularization at equal compute\n",
        f"Model `{settings['model']}`, {len(document['clips'])} clips of the {settings['split']} "
        f"split, {settings['num_inference_steps'][0]} steps, moreg_divisor "
        f"{document['moreg_divisor']:g} of the published MoReg.\n",
    ]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables(document)]
    return "\n".join([*parts, "## How it was measured\n", _method(document)])


def _method(document: Mapping[str, Any]) -> str:
    environment = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    lines = [
        "Motion: mean absolute difference of neighbouring frames of the uncached clip, pixels in "
        "[0, 1]. The fast half are the clips with the most; prompts play no part.",
        "All were swept over `rel_l1_thresh`, the factor of the codebook's thresholds. "
        "Compute fraction (computed calls over all calls) and PSNR against "
        "the uncached clip (mean over the frames) were kept for every clip, and interpolated "
        "linearly between the two settings next to the wanted compute. - : not reached.",
        f"{PER_HALF}: each half of the clips is given the same mean compute with and without "
        "MoReg, by a setting of its own. It asks whether MoReg spends a clip's compute at better "
        "steps.",
        f"{OVER_ALL}: one setting for all clips, chosen so that the mean compute over all of them "
        "is the same. MoReg may then move compute from slow to fast clips, as the columns of "
        "compute show. It asks what MoReg does for fast clips, and what that costs the slow ones.",
        "Gain: PSNR with MoReg less PSNR without it, mean ± standard error over the same clips.",
    ]
    return "\n".join(f"- {line}" for line in [*lines, f"Environment: {environment}."]) + "\n"
