"""What a soak counts after each generation, and its report."""

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

WARMUP, AVERAGED = 20, 5
"""Generations before memory is compared, and those whose median is taken at both ends."""
ALLOWED_GROWTH = 0.01


@dataclass(slots=True)
class Counts:
    """What the process holds after a generation."""

    rss_bytes: int
    tensors: int
    files: int
    threads: int
    hooks: int


def counted(models: Iterable[nn.Module]) -> Counts:
    """What the process holds, after a collection of garbage; hooks are those of ``models``."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss, files = pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
    else:
        rss, files = 0, 0
    modules = [module for model in models for module in model.modules()]
    return Counts(
        rss_bytes=rss,
        tensors=sum(1 for x in gc.get_objects() if type(x) is Tensor),
        files=files,
        threads=threading.active_count(),
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
    )


def growth(values: Sequence[int]) -> float:
    """From after the warm-up to the end, as a share; 0 of fewer generations than it takes."""
    settled = values[min(WARMUP, len(values) // 2) :]
    if len(settled) < 2 * AVERAGED or not settled[0]:
        return 0.0
    before, after = median(settled[:AVERAGED]), median(settled[-AVERAGED:])
    return after / before - 1.0


def grown(warm: Counts, last: Counts, rss_bytes: Sequence[int]) -> dict[str, float]:
    """By which share each count is larger in ``last`` than in ``warm``; memory by its medians."""
    counts = {name: (getattr(warm, name), getattr(last, name)) for name in Counts.__slots__}
    shares = {name: (now - then) / max(then, 1) for name, (then, now) in counts.items()}
    return {**shares, "rss_bytes": growth(rss_bytes)}


def render(found: Mapping[str, Any]) -> str:
    """The report as markdown."""
    grown = "\n".join(
        f"| {name} | {found['last'][name]} | {100 * share:+.2f} % |"
        for name, share in found["growth"].items()
    )
    happened = ", ".join(f"{name} {count}" for name, count in found["events"].items())
    methods = ", ".join(f"{name} {count}" for name, count in found["methods"].items())
    failures = "\n".join(f"- {each}" for each in found["failures"]) or "None."
    environment = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    return (
        f"# Soak\n\n{found['generations']} generations in one process, of "
        f"{', '.join(found['families'])}, drawn with seed {found['seed']}. What happened in them: "
        f"{happened}. Methods: {methods}.\n\n"
        "Every undisturbed generation was compared bit for bit, and by its computed steps, with a "
        "pipeline made anew.\n\n"
        f"| held | at the end | since the warm-up of {WARMUP} |\n| --- | ---: | ---: |\n{grown}\n\n"
        f"## Failures\n\n{failures}\n\n- Environment: {environment}.\n"
    )
