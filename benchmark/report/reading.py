"""Results of earlier versions under the names of this one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.run.store import read_json
from benchmark.score.scoring import FID, JUDGE_DISTANCE


def read_results(path: Path) -> dict[str, Any]:
    """A results file, `modernised`; `BenchmarkError` if it cannot be read."""
    return modernised(read_json(path))


def modernised(document: Mapping[str, Any]) -> dict[str, Any]:
    """What was called "fid" is the judge's distance, unless its network was Inception.

    The compute fraction, which was that of the blocks, is that of the whole denoiser if it is
    there. A document of this version stays as it is.
    """
    if FID not in document:
        return dict(document)
    described = document[FID]
    document = {name: value for name, value in document.items() if name != FID}
    renamed = _renamed if "Inception" not in described else dict
    for name in ("results", "interpolated"):
        if name in document:
            document[name] = [_with_compute(renamed(row)) for row in document[name]]
    if "at_fractions" in document:
        document["at_fractions"] = [renamed(entry) for entry in document["at_fractions"]]
    return {**document, "distance": described}


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {FID: JUDGE_DISTANCE, f"{FID}_std": f"{JUDGE_DISTANCE}_std"}
    row = {names.get(name, name): value for name, value in row.items()}
    if row.get("quantity") == FID:
        row["quantity"] = JUDGE_DISTANCE
    return row


def _with_compute(row: dict[str, Any]) -> dict[str, Any]:
    total = row.pop("total_compute_fraction", None)
    return row if total is None else {**row, "compute_fraction": total}
