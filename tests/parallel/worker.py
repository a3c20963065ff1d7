"""One process of a group: runs the cases of its world size and reports them as JSON lines.

``python -m tests.parallel.worker OUTPUT_DIRECTORY [PART_OF_NAME ...]`` with torchrun's environment
variables; parts of names choose cases.
"""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.parallel import runs
from tests.parallel.cases import CASES, Case
from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import Degrees, start, stop

SECONDS_A_CASE = 300


def report(case: Case) -> dict[str, Any]:
    """What this rank saw in one case; an error is part of it."""
    try:
        with torch.no_grad():
            return runs.FAMILIES[case.family](case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main(directory: Path, parts: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cases = [case for case in CASES if case.world_size == world_size]
    cases = [case for case in cases if not parts or any(part in case.name for part in parts)]
    cases.sort(key=lambda case: str(case.degrees))  # joining for other degrees takes long
    joined = None
    with open(directory / f"rank{rank}.jsonl", "w") as file:
        for case in cases:
            faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
            if case.degrees != joined:
                runs.ENGINE_CONFIG = start(Degrees(**case.degrees))
                joined = case.degrees
            file.write(json.dumps({"case": case.name, "rank": rank, **report(case)}) + "\n")
            file.flush()
    faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
