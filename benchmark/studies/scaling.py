"""What decisions cost on several devices: measured on processes over gloo, modelled beyond them.

It starts groups of 1, 2 and 4 processes of itself.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from diffusers import FluxPipeline
from rich.console import Console

from benchmark.models.package import ranks
from benchmark.run.store import write_json, write_text
from benchmark.settings import PIPELINES, ROOT
from benchmark.studies.catalogue import ScalingOptions
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.xfuser_adapters import launch

METHODS = ("None", "Fast", "Tea+AdaCorrection", "Auto")
SIZES = (1, 2, 4)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
DEGREES = (1, 2, 4, 8, 16, 32, 64)
GROUP_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the model assumes; FLUX.1-dev at 1024x1024 in bfloat16 on nodes of 8 GPUs."""

    blocks: int = 57
    tokens: int = 4608
    channels: int = 3072
    steps: int = 28
    flops_a_step: float = 1.26e14
    """2 * 12e9 parameters * tokens, and 4 * tokens^2 * channels a block for attention."""
    flops_a_second: float = 4e14
    """Sustained, of one GPU."""
    node_gpus: int = 8
    bytes_a_second: float = 3e11
    """Of one GPU to the others of its node."""
    bytes_a_second_between_nodes: float = 5e10
    """Of one GPU to those of other nodes."""
    message_seconds: float = 1e-5
    """Latency of a collective within a node, and of each doubling beyond it."""
    read_seconds: float = 2e-5
    """Until a decision is on the host."""
    other_seconds: float = 0.15
    """A picture's text encoders and VAE, which every rank runs by itself and no cache shortens."""
    load: float = 40.0
    """Pictures a second that are asked for."""
    sequence_degree: int = 8
    """Devices that share a picture; more make replicas."""

    def message(self, ranks: int) -> float:
        """Latency of a collective: that of a node, and as much for each doubling of nodes."""
        if ranks == 1:
            return 0.0
        return self.message_seconds * (1 + max(math.log2(ranks / self.node_gpus), 0.0))

    def step_seconds(self) -> float:
        """A computed step: blocks, and four all-to-alls (q, k, v, out) a block."""
        degree = self.sequence_degree
        moved = self.tokens * self.channels * 2 / degree * (degree - 1) / degree
        within = degree <= self.node_gpus
        speed = self.bytes_a_second if within else self.bytes_a_second_between_nodes
        exchange = 4 * (self.message(degree) + moved / speed)
        compute = self.flops_a_step / degree / self.flops_a_second
        return compute + self.blocks * exchange

    def decision_seconds(self, ranks: int) -> float:
        """One reduction of 64 bytes over ``ranks`` and one read."""
        return self.message(ranks) + self.read_seconds

    def picture_seconds(self, compute_fraction: float | None) -> float:
        """One picture, with a cache's compute fraction or without a cache."""
        steps = self.steps * self.step_seconds()
        if compute_fraction is not None:
            own = self.steps * self.decision_seconds(self.sequence_degree)
            steps = compute_fraction * steps + own
        return self.other_seconds + steps

    def row(self, gpus: int, compute_fraction: float) -> dict[str, float]:
        """Replicas under the load; decisions in their group, or over all GPUs."""
        uncached, cached = self.picture_seconds(None), self.picture_seconds(compute_fraction)
        replicas = gpus // self.sequence_degree
        own, world = (self.decision_seconds(n) for n in (self.sequence_degree, gpus))
        return {
            "gpus": gpus,
            "replicas": replicas,
            "uncached_s": uncached,
            "cached_s": cached,
            "uncached_pictures_per_s": replicas / uncached,
            "cached_pictures_per_s": replicas / cached,
            "uncached_busy": self.load * uncached / replicas,
            "cached_busy": self.load * cached / replicas,
            "decision_share": self.steps * own / cached,
            "world_decision_share": self.steps * world / (cached + self.steps * (world - own)),
        }

    def degree_row(self, degree: int, compute_fraction: float) -> dict[str, float]:
        """The same picture on so many ranks: what more of them, and what the cache, still gain."""
        own = replace(self, sequence_degree=degree)
        uncached, cached = own.picture_seconds(None), own.picture_seconds(compute_fraction)
        return {
            "degree": degree,
            "uncached_s": uncached,
            "cached_s": cached,
            "speedup": uncached / cached,
            "uncached_gpu_s": degree * uncached,
            "cached_gpu_s": degree * cached,
            "gpus_for_load_uncached": degree * math.ceil(self.load * uncached),
            "gpus_for_load_cached": degree * math.ceil(self.load * cached),
        }

    def shortest_step(self, compute_fraction: float) -> float:
        """Seconds of a step below which its decision costs more than the cache saves."""
        return self.decision_seconds(self.sequence_degree) / (1 - compute_fraction)


def measure(steps: int, repetitions: int) -> list[dict[str, Any]]:
    """In a group: latency, bytes of decisions a call, and compute fraction of each method."""
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    pipe = FluxPipeline.from_pretrained(PIPELINES / "flux")
    pipe.set_progress_bar_config(disable=True)
    if size > 1:
        pipe = launch.parallelise(pipe, launch.start(launch.Degrees(ulysses_degree=size)))
    sent: list[int] = []
    reduce = ranks.all_reduce

    def counted(tensor: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, **options)

    ranks.all_reduce = counted

    def picture() -> float:
        sent.clear()
        start = time.perf_counter()
        pipe(
            prompt="a red circle on a green background",
            num_inference_steps=steps,
            height=64,
            width=64,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return time.perf_counter() - start

    rows = []
    for name in METHODS:
        if name != "None":
            enable_cache(pipe, CacheConfig.from_name(name))
        picture()
        seconds = [picture() for _ in range(repetitions)]
        summary = cache_summary(pipe) if name != "None" else None
        rows.append(
            {
                "processes": size,
                "cache_method": name,
                "latency_s": median(seconds),
                "latency_min_s": min(seconds),
                "latency_max_s": max(seconds),
                "compute_fraction": summary.compute_fraction if summary else 1.0,
                "decision_bytes_per_call": sum(sent) / steps,
                "largest_message_bytes": max(sent, default=0),
            }
        )
        if name != "None":
            disable_cache(pipe)
    if size > 1:
        launch.stop()
    return rows


def run_groups(options: ScalingOptions) -> list[dict[str, Any]]:
    """The rows of every group size, measured one after the other."""
    rows = []
    for size in SIZES:
        file = options.output_dir / f"processes-{size}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(size), "-m", "benchmark", "scaling"]
        command += ["--output_dir", str(options.output_dir.absolute())]
        command += ["--steps", str(options.steps), "--repetitions", str(options.repetitions)]
        subprocess.run(command, check=True, timeout=GROUP_SECONDS, cwd=ROOT)
        rows += json.loads(file.read_text())
        file.unlink()
    return rows


def report(rows: list[dict[str, Any]], machine: Machine, fraction: float) -> str:
    """Both tables as markdown."""
    lines = [
        "# Decisions on several devices",
        "",
        "## Measured: the small FLUX, Ulysses over gloo, one thread a process",
        "",
        "More processes than cores, or a model this small, gain nothing by parallelism; what counts"
        " here are the bytes, and that the compute fraction is the same.",
        "",
        "| processes | method | latency s (min, max) | compute fraction | decision bytes a call |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['latency_min_s']:.2f}, {row['latency_max_s']:.2f}"
        lines.append(
            f"| {row['processes']} | {row['cache_method']} | {row['latency_s']:.2f} ({spread}) "
            f"| {row['compute_fraction']:.3f} | {row['decision_bytes_per_call']:.1f} |"
        )
    lines += [
        "",
        "## Modelled, not measured",
        "",
        f"Seconds a step = FLOPs / (devices a picture x FLOP/s) + blocks x 4 x (latency + bytes / "
        f"bandwidth); a decision = latency + read. Compute fraction {fraction}; assumptions: "
        + ", ".join(f"{name} {value:g}" for name, value in asdict(machine).items())
        + ".",
        "",
        f"Replicas of {machine.sequence_degree} ranks, asked for {machine.load:g} pictures a "
        "second. Busy: load over capacity; above 100 % pictures pile up. The last column is what "
        "the decisions' share would be if they were reduced over all GPUs.",
        "",
        "| GPUs | replicas | s a picture: uncached, cached | pictures/s: uncached, cached "
        "| busy: uncached, cached | decisions' share | over all GPUs |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        row = machine.row(gpus, fraction)
        lines.append(
            f"| {gpus} | {row['replicas']} | {row['uncached_s']:.2f}, {row['cached_s']:.2f} "
            f"| {row['uncached_pictures_per_s']:.1f}, {row['cached_pictures_per_s']:.1f} "
            f"| {row['uncached_busy']:.0%}, {row['cached_busy']:.0%} "
            f"| {row['decision_share']:.2%} | {row['world_decision_share']:.2%} |"
        )
    lines += [
        "",
        "One picture on more ranks, and the GPUs that the load then needs:",
        "",
        "| ranks a picture | s: uncached, cached | gain by the cache "
        "| GPU-seconds: uncached, cached | GPUs for the load: uncached, cached |",
        "|---|---|---|---|---|",
    ]
    for degree in DEGREES:
        row = machine.degree_row(degree, fraction)
        lines.append(
            f"| {degree} | {row['uncached_s']:.2f}, {row['cached_s']:.2f} | {row['speedup']:.2f} "
            f"| {row['uncached_gpu_s']:.1f}, {row['cached_gpu_s']:.1f} "
            f"| {row['gpus_for_load_uncached']}, {row['gpus_for_load_cached']} |"
        )
    lines += [
        "",
        f"A decision costs more than it saves where a step takes less than "
        f"{machine.shortest_step(fraction) * 1e6:.0f} microseconds.",
    ]
    return "\n".join(lines) + "\n"


def run(options: ScalingOptions, console: Console) -> None:
    """Measure and model, then write ``results.json`` and ``report.md``; in a group: measure."""
    if "RANK" in os.environ:
        rows = measure(options.steps, options.repetitions)
        if os.environ["RANK"] == "0":
            size = os.environ["WORLD_SIZE"]
            write_json(options.output_dir / f"processes-{size}.json", rows)
        return
    rows, machine, fraction = (
        run_groups(options),
        Machine(load=options.load),
        options.compute_fraction,
    )
    content = {
        "measured": rows,
        "assumed": asdict(machine),
        "modelled": [machine.row(gpus, fraction) for gpus in GPUS],
        "modelled_degrees": [machine.degree_row(degree, fraction) for degree in DEGREES],
    }
    write_json(options.output_dir / "results.json", content)
    write_text(options.output_dir / "report.md", report(rows, machine, fraction))
    console.print(f"Report: {options.output_dir / 'report.md'}", soft_wrap=True)
