"""Groups of processes; each rank runs the cases of its size and reports them as JSON lines.

``python -m tests.parallel.worker DIRECTORY [PART_OF_NAME ...]`` starts one group after the other;
parts of names choose cases. Ranks are forked once xfuser is imported, which takes long. What rank R
of a group of N says is in ``DIRECTORY/N/rankR.log``, its reports in ``rankR.jsonl``.
"""

import faulthandler
import json
import os
import socket
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.parallel import plans, runs
from tests.parallel.cases import CASES, Case
from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import Degrees, start, stop
from xfuser_adacorr.model_executor.cache.xfuser_adapters.platform import load_xfuser

SECONDS_A_CASE = 300


def report(case: Case) -> dict[str, Any]:
    """What this rank saw in one case; an error is part of it."""
    try:
        with torch.no_grad():
            if case.family in plans.PIPELINES:
                return plans.run_plans(case)
            return runs.FAMILIES[case.family](case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def run_rank(rank: int, cases: list[Case], port: int, directory: Path) -> None:
    """All cases of one group, in a process of its own."""
    size = cases[0].world_size
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(directory / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(directory: Path, parts: list[str]) -> None:
    torch.set_num_threads(1)
    load_xfuser()
    chosen = [case for case in CASES if not parts or any(part in case.name for part in parts)]
    chosen.sort(key=lambda case: str(case.degrees))  # joining for other degrees takes long
    for size in sorted({case.world_size for case in chosen}):
        cases = [case for case in chosen if case.world_size == size]
        folder, port = directory / str(size), free_port()
        folder.mkdir()
        ranks = [
            get_context("fork").Process(target=run_rank, args=(rank, cases, port, folder))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
