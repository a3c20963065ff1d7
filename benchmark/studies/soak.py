"""Many generations in one process, broken off in all ways: is anything left behind?

Each generation draws a pipeline, a method, a sampler, prompts, a size and what happens to it. One
that is not disturbed has to be equal, bit for bit, to that of a pipeline made anew. After each the
process's memory, live tensors, open files, threads and hooks are counted.
"""

import copy
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from rich.console import Console
from torch import Tensor

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES, Request
from benchmark.models.loading import entry_text, load_pipeline, load_prompts
from benchmark.models.schedulers import make_scheduler
from benchmark.run.store import write_json, write_text
from benchmark.settings import Settings
from benchmark.studies.catalogue import SoakOptions
from benchmark.studies.soak_report import ALLOWED_GROWTH, WARMUP, counted, grown, render
from xfuser_adacorr import Method, cache_summary, disable_cache, enable_cache, reset_cache
from xfuser_adacorr.config import method_named

METHODS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("Auto", {"adacorr_tolerance": 0.02}),
    ("Auto", {"target_compute": 0.5, "use_plan": False}),
    ("Fb", {"rel_l1_thresh": 0.4}),
    ("Tea", {"rel_l1_thresh": 0.2}),
    ("Fast", {"rel_l1_thresh": 0.1}),
    ("Ada", {"codebook": {0.3: 3, 1.0: 2}}),
    ("Schedule", {"schedule": 3}),
    ("Schedule", {"schedule": 2, "stand_in": "forecast"}),
    ("Fb+AdaCorrection", {"rel_l1_thresh": 0.4, "adacorr_tolerance": 0.03}),
    ("Tea+AdaCorrection", {"rel_l1_thresh": 0.2, "adacorr_tolerance": 0.03}),
    ("Fast+AdaCorrection", {"rel_l1_thresh": 0.3, "adacorr_tolerance": 0.03}),
)
"""Loose enough to reuse within a few steps."""
EVENTS = ("none", "none", "none", "exception", "interrupt", "reset", "left")
"""What happens in the middle: an error or an interrupt in the denoiser, `reset_cache`, or the
pipeline's loop is left by an error of its own, which the cache does not see."""
STEPS = (4, 5, 6, 8)
SIZES = (32, 48, 64)
CHANGES = 0.35
"""How often a pipeline gets another method."""


class Left(Exception):
    """Raised in the pipeline's loop, outside of the denoiser."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One generation."""

    family: str
    method: int
    solver: int
    steps: int
    size: int
    texts: tuple[str, ...]
    seed: int
    event: str
    at: int
    """Computed call of the denoiser, counted from 1, in which it happens."""


@dataclass(slots=True)
class Kept:
    """A pipeline that goes through the whole soak."""

    pipe: Any
    entries: list[dict[str, Any]]
    method: int | None = None
    """Which of `METHODS` is enabled."""
    schedulers: list[Any] = field(default_factory=list)


def load(family: str) -> Kept:
    """The family's small pipeline with its prompts, and the schedulers that it is sampled with."""
    settings = Settings(model_type=family, split="development", threads=1)
    pipe = load_pipeline(settings)
    own = pipe.scheduler
    schedulers = [own, make_scheduler(FAMILIES[family].solvers[1], own, max(STEPS))]
    if family == "pixart":
        schedulers += [
            DDIMScheduler.from_config(own.config),
            EulerAncestralDiscreteScheduler.from_config(own.config),
        ]
    return Kept(pipe, load_prompts(settings), schedulers=schedulers)


def drawn(rng: random.Random, families: Mapping[str, Kept]) -> Draw:
    family = rng.choice(sorted(families))
    kept = families[family]
    method = kept.method
    if method is None or rng.random() < CHANGES:
        method = rng.randrange(len(METHODS))
    fixed = FAMILIES[family].fixed_size
    return Draw(
        family=family,
        method=method,
        solver=rng.randrange(len(kept.schedulers)),
        steps=rng.choice(STEPS),
        size=FAMILIES[family].picture_size(kept.pipe) if fixed else rng.choice(SIZES),
        texts=tuple(entry_text(e) for e in rng.sample(kept.entries, rng.choice((1, 1, 2)))),
        seed=rng.randrange(2**31),
        event=rng.choice(EVENTS),
        at=rng.choice((1, 2, 3)),
    )


def arguments(pipe: Any, draw: Draw) -> dict[str, Any]:
    family = FAMILIES[draw.family]
    asked = Request(
        text=list(draw.texts),
        height=draw.size,
        width=draw.size,
        num_frames=family.num_frames and 4,
        guidance_scale=family.guidance_scale,
    )
    return {
        **family.call(pipe, asked),
        "num_inference_steps": draw.steps,
        "generator": torch.Generator("cpu").manual_seed(draw.seed),
        "output_type": "latent" if family.gives_latents else "pt",
    }


@contextmanager
def disturbed(pipe: Any, draw: Draw) -> Iterator[list[str]]:
    """The event happens while the context is open; the list names it once it has."""
    happened: list[str] = []
    calls = 0

    def at_call(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != draw.at or draw.event in ("none", "left"):
            return
        happened.append(draw.event)
        if draw.event == "reset":
            reset_cache(pipe)
        elif draw.event == "exception":
            raise OSError("the device is gone")
        else:
            raise KeyboardInterrupt

    progress = pipe.progress_bar

    def bar(*args: Any, **kwargs: Any) -> Any:
        shown = progress(*args, **kwargs)
        update, steps = shown.update, 0

        def left(*given: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == draw.at:
                happened.append("left")
                raise Left
            return update(*given)

        shown.update = left
        return shown

    handle = pipe.transformer.register_forward_pre_hook(at_call)
    if draw.event == "left":
        pipe.progress_bar = bar
    try:
        yield happened
    finally:
        handle.remove()
        pipe.__dict__.pop("progress_bar", None)


def generate(pipe: Any, draw: Draw) -> Tensor:
    with torch.no_grad():
        output = pipe(**arguments(pipe, draw), return_dict=False)[0]
    return torch.as_tensor(output).float()


def fresh(kept: Kept, draw: Draw) -> tuple[Tensor, int]:
    """The same generation on a new pipeline whose cache knows no other, and its computed steps."""
    parts = {**kept.pipe.components, "transformer": copy.deepcopy(kept.pipe.transformer)}
    parts["scheduler"] = copy.deepcopy(_plain(kept.schedulers[draw.solver]))
    pipe = _like(kept.pipe, parts)
    name, options = METHODS[draw.method]
    enable_cache(pipe, method_named(name, **options))
    picture = generate(pipe, draw)
    return picture, cache_summary(pipe).computed_steps


def _plain(scheduler: Any) -> Any:
    """A copy that no cache has taken over."""
    made = type(scheduler).from_config(scheduler.config)
    for name in ("start", "grid"):  # what the benchmark's solvers have beside their config
        if hasattr(scheduler, name):
            setattr(made, name, copy.deepcopy(getattr(scheduler, name)))
    return made


def _like(pipe: Any, parts: Mapping[str, Any]) -> Any:
    made = copy.copy(pipe)
    made.__dict__.update(parts)
    return made


def play(kept: Kept, draw: Draw) -> tuple[str, str | None]:
    """Make a generation; what happened to it, and what is wrong, if anything."""
    pipe, (name, options) = kept.pipe, METHODS[draw.method]
    if kept.method != draw.method:
        if kept.method is not None:
            disable_cache(pipe)
        method: Method = method_named(name, **options)
        enable_cache(pipe, method)
        kept.method = draw.method
    pipe.scheduler = kept.schedulers[draw.solver]
    picture = None
    with disturbed(pipe, draw) as happened:
        try:
            picture = generate(pipe, draw)
        except (OSError, KeyboardInterrupt, Left):
            if not happened:
                raise
    event = happened[0] if happened else "none"
    if event != "none":
        return event, None
    computed = cache_summary(pipe).computed_steps
    expected, steps = fresh(kept, draw)
    if not torch.equal(picture, expected):
        return event, f"differs from a fresh run by {float((picture - expected).abs().max()):.3g}"
    if computed != steps:
        return event, f"computed {computed} steps, a fresh run {steps}"
    return event, None


def put_down(families: Mapping[str, Kept]) -> None:
    """No cache enabled, every sampler used alike: the draws do not decide what is held then."""
    for family, kept in families.items():
        if kept.method is not None:
            disable_cache(kept.pipe)
            kept.method = None
        for solver, scheduler in enumerate(kept.schedulers):
            kept.pipe.scheduler = scheduler
            alike = Draw(
                family=family,
                method=0,
                solver=solver,
                steps=STEPS[0],
                size=FAMILIES[family].picture_size(kept.pipe),
                texts=(entry_text(kept.entries[0]),),
                seed=0,
                event="none",
                at=1,
            )
            generate(kept.pipe, alike)


def soak(
    families: Mapping[str, Kept],
    generations: int,
    minutes: float | None,
    seed: int,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Draw and make generations, until ``minutes`` are over or ``generations`` are made.

    Memory is counted after each; tensors, files, threads and hooks are compared between two points
    at which everything is put down, after the warm-up and at the end.
    """
    rng, end = random.Random(seed), None if minutes is None else time.monotonic() + 60 * minutes
    models = [kept.pipe.transformer for kept in families.values()]
    held, warm = [], None
    failures, events, methods = [], Counter(), Counter()
    while len(held) < generations and (end is None or time.monotonic() < end):
        draw = drawn(rng, families)
        event, wrong = play(families[draw.family], draw)
        events[event] += 1
        methods[METHODS[draw.method][0]] += 1
        held.append(counted(models))
        if wrong is not None:
            failures.append(f"generation {len(held)}: {draw}: {wrong}")
        told(f"{len(held)}: {draw.family} {METHODS[draw.method][0]} {event} {wrong or ''}")
        if len(held) == WARMUP:
            put_down(families)
            warm = counted(models)
    put_down(families)
    last = counted(models)
    growth = grown(warm or last, last, [each.rss_bytes for each in held])
    failures += [
        f"{name} grew by {100 * share:.1f} %"
        for name, share in growth.items()
        if share > ALLOWED_GROWTH
    ]
    return {
        "generations": len(held),
        "seed": seed,
        "events": dict(sorted(events.items())),
        "methods": dict(sorted(methods.items())),
        "growth": {name: round(share, 5) for name, share in growth.items()},
        "last": asdict(last),
        "failures": failures,
        "rss_mib": [round(each.rss_bytes / 2**20, 1) for each in held],
        "tensors": [each.tensors for each in held],
    }


def run(options: SoakOptions, console: Console) -> None:
    """Soak, then write ``results.json`` and ``report.md``; `BenchmarkError` if anything failed."""
    torch.set_num_threads(1)
    families = {name: load(name) for name in options.families}
    found = {
        "schema": 1,
        "families": list(options.families),
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers")},
            "system": f"{platform.system()} {platform.machine()}",
        },
        **soak(families, options.generations, options.minutes, options.seed, console.print),
    }
    write_json(options.output_dir / "results.json", found)
    write_text(options.output_dir / "report.md", render(found))
    console.print(f"Report: {options.output_dir / 'report.md'}")
    if found["failures"]:
        raise BenchmarkError(f"soak: {len(found['failures'])} failures: {found['failures'][0]}")
