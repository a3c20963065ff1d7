"""Every study of the benchmark: its question, the options that it takes, and where it writes.

Nothing heavy is imported here, so that help and mistakes on the command line answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.names import CORRECTED, LEARNED, LEARNING, METHOD_NAMES, OURS
from benchmark.options import (
    SHARE,
    Check,
    above,
    check_options,
    number,
    one_of,
    option,
    whole,
)
from benchmark.settings import NAMES, PIPELINES, ROOT

RESULTS = ROOT / "benchmark" / "results"
_MODEL = ("model_type", "model", "prompts", "judge", "num_inference_steps", "guidance_scale")
_RUN = ("split", "num_prompts", "device", "threads", "output_dir", "resume")
_TIMED = (*_RUN[1:], "repetitions", "warmup", "workers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A command ``python -m benchmark NAME``.

    Its module has ``run(settings, options, console)``, of which it takes what it has.
    """

    name: str
    question: str
    module: str
    takes: tuple[str, ...] = ()
    """Names of the `Settings` that can be given; none: it has no settings."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of settings, where the study has others."""
    options: type | None = None
    """Dataclass of the options that it has for itself."""
    output: str = ""
    """Where it writes by default, below ``benchmark/results``; FAMILY and STEPS are filled in."""
    width: int = 130
    """Columns that its tables need."""


class Checked:
    """A study's own options, checked."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class ParetoOptions(Checked):
    methods: tuple[str, ...] | None = option(
        "as compare's --cache_methods",
        many=True,
        shown="ours, and all other projects' that are installed and have the family",
    )
    latency: bool = option("also measure latency, all rows in turn", False)
    tuning_prompts: int = whole("of the development split", 8)
    search_evaluations: int = whole(
        "schedules that the search for each budget scores at the most", 40
    )
    results_dir: Path = option("for pareto_FAMILY_STEPS.json, .md and .png", RESULTS, read=Path)
    update_results: bool = option(
        "run nothing: the tables and the figure of docs/results.md, from --results_dir", False
    )


@dataclass(frozen=True, kw_only=True)
class CrossModelOptions(Checked):
    families: tuple[str, ...] | None = option(
        "model families", check=one_of(FAMILIES), many=True, shown="all shipped"
    )
    pipelines: Path = option(
        "folder with a diffusers directory named FAMILY for each", PIPELINES, read=Path
    )
    configs: Path = option("folder with FAMILY.yaml for each", ROOT / "configs/small", read=Path)
    update_results: bool = option(
        "run nothing: the table of docs/results.md, from --output_dir", False
    )


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Checked):
    compute_fractions: tuple[float, ...] = option(
        "where the variants are compared",
        (0.25, 0.35),
        read=float,
        check=Check(lambda share: 0 < share < 1, "between 0 and 1"),
        many=True,
    )
    variants: tuple[str, ...] | None = option(
        "only these, by their names in the report", many=True, shown="all"
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(Checked):
    half: str = option(
        "half precision type; float16 takes a GPU to be quick",
        "bfloat16",
        check=one_of(("bfloat16", "float16")),
    )


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Checked):
    budgets: tuple[float, ...] = number(
        "shares of the calls to compute", (0.25, 0.35, 0.5), SHARE, many=True
    )


@dataclass(frozen=True, kw_only=True)
class CliffOptions(Checked):
    settings: int = whole("of each method's main option, an odd number; 1: defaults alone", 13)
    factor: float = number("between neighbouring settings", 1.25, above(1))


@dataclass(frozen=True, kw_only=True)
class SoakOptions(Checked):
    generations: int = whole("at the most", 200)
    minutes: float | None = number("after which no other generation begins", None, above(0))
    families: tuple[str, ...] = option(
        "small pipelines", ("dit", "flux", "pixart"), check=one_of(FAMILIES), many=True
    )
    seed: int = whole("of what is drawn", 0, least=0)
    output_dir: Path = option("where to write", RESULTS / "soak", read=Path)


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(Checked):
    output_dir: Path = option("where to write", RESULTS / "scaling", read=Path)
    steps: int = whole("of each picture", 28, least=4)
    repetitions: int = whole("timed pictures", 3)
    load: float = number("modelled pictures a second", 40.0, above(0))
    compute_fraction: float = number("modelled", 0.36, SHARE)


PAPER_GROUPS = ("table", "modules", "rivals", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class PaperTableOptions(Checked):
    samples: int = whole("pictures of every row", 512, least=2)
    batch_size: int = whole("of them made at once", 32)
    compute: float = number("of Auto and Learned", 0.4, SHARE)
    groups: tuple[str, ...] = option("rows", PAPER_GROUPS, check=one_of(PAPER_GROUPS), many=True)


GPU_MODELS = ("flux", "opensora")
GPU_MODES = ("eager", "compile", "cudagraphs")
"""How blocks run: as written; each compiled into one graph; those graphs as CUDA graphs."""
LEAST_REUSED = 4
"""Calls after the first computed ones: the last two may be forced."""


@dataclass(frozen=True, kw_only=True)
class GpuOptions(Checked):
    model: tuple[str, ...] = option("models", GPU_MODELS, check=one_of(GPU_MODELS), many=True)
    modes: tuple[str, ...] | None = option(
        "how blocks run", check=one_of(GPU_MODES), many=True, shown="all that can"
    )
    rows: tuple[str, ...] | None = option("names of the table's rows", many=True, shown="all")
    steps: int = option("of each generation", 20, read=int)
    computed_steps: int = whole("first steps that every cache computes", 8, least=2)
    rounds: int = whole("timed ones; two go before them", 5)
    dry_run: bool = option("tiny models on the CPU", False)
    output_dir: Path | None = option("where to write", read=Path, shown="benchmark/results/gpu")
    resume: bool = option("go on with the run in --output_dir", False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps < self.computed_steps + LEAST_REUSED:
            raise BenchmarkError(
                f"--steps must be at least {LEAST_REUSED} above --computed_steps "
                f"{self.computed_steps}, got {self.steps}"
            )
        possible = GPU_MODES[:2] if self.dry_run else GPU_MODES
        if not set(self.modes or ()) <= set(possible):
            raise BenchmarkError(
                f"--modes: cudagraphs needs a GPU; accepted with --dry_run: {', '.join(possible)}"
            )
        if self.dry_run and self.output_dir is None:
            raise BenchmarkError("--output_dir must be given with --dry_run: it measures nothing")
        object.__setattr__(self, "modes", self.modes or possible)
        object.__setattr__(self, "output_dir", self.output_dir or RESULTS / "gpu")


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="compare",
            question="How do cache methods compare on one pipeline, at what cost?",
            module="benchmark.studies.compare",
            takes=NAMES,
        ),
        Study(
            name="pareto",
            question="Which method is best at equal compute, other projects' and fewer steps too?",
            module="benchmark.studies.pareto",
            takes=(*_MODEL, "config", "true_cfg_scale", *_TIMED),
            options=ParetoOptions,
            width=190,
        ),
        Study(
            name="cross_model",
            question="Do all methods work on all model families?",
            module="benchmark.studies.cross_model",
            takes=("cache_methods", *_TIMED),
            defaults={"cache_methods": (*METHOD_NAMES, LEARNED, LEARNING)},
            options=CrossModelOptions,
            output="cross_model",
            width=150,
        ),
        Study(
            name="ablations",
            question="What does each part of AdaCorrection bring at equal compute?",
            module="benchmark.studies.ablations",
            takes=(*_MODEL, "true_cfg_scale", "dtype", *_RUN),
            defaults={"split": "development", "num_prompts": 6},
            options=AblationOptions,
            output="ablations/FAMILY_STEPS",
        ),
        Study(
            name="precision",
            question="What does caching cost in half precision?",
            module="benchmark.studies.precision",
            takes=(*_MODEL, "config", "cache_methods", "true_cfg_scale", *_RUN),
            defaults={
                "split": "development",
                "num_prompts": 3,
                "cache_methods": ("Auto", "Fb" + CORRECTED, "Fb"),
            },
            options=PrecisionOptions,
            output="precision/FAMILY_STEPS",
        ),
        Study(
            name="paper_table",
            question="What does AdaCorrection bring each base method at equal compute?",
            module="benchmark.studies.paper_table",
            takes=(*_MODEL, "config", *_RUN),
            defaults={"model_type": "dit", "num_prompts": 64},
            options=PaperTableOptions,
            output="paper_table/FAMILY_STEPS",
        ),
        Study(
            name="budget",
            question="Is a compute budget (target_compute) held?",
            module="benchmark.studies.budget",
            takes=(*_MODEL, *_RUN),
            defaults={"num_prompts": 8},
            options=BudgetOptions,
            output="budget/FAMILY_STEPS",
        ),
        Study(
            name="cliffs",
            question="Does a method's main option act smoothly, and do its defaults act at all?",
            module="benchmark.studies.cliffs",
            takes=("cache_methods", *_MODEL, "config", *_RUN),
            defaults={
                "split": "development",
                "num_prompts": 2,
                "num_inference_steps": (12, 20, 28, 50),
                "cache_methods": OURS,
            },
            options=CliffOptions,
            output="cliffs/FAMILY",
            width=150,
        ),
        Study(
            name="reuse_cost",
            question="How long does a reused call take, as a share of a computed one?",
            module="benchmark.studies.reuse_cost",
            takes=(*_MODEL, "config", "repetitions", *_RUN),
            defaults={"num_inference_steps": (50,), "repetitions": 5, "num_prompts": 1},
            output="reuse_cost",
        ),
        Study(
            name="soak",
            question="Do many generations, broken off in all ways, leave anything behind?",
            module="benchmark.studies.soak",
            options=SoakOptions,
        ),
        Study(
            name="scaling",
            question="What do decisions cost on several devices?",
            module="benchmark.studies.scaling",
            options=ScalingOptions,
        ),
        Study(
            name="gpu",
            question="How fast is every cache on models of published sizes, and what memory?",
            module="benchmark.gpu.figures",
            options=GpuOptions,
        ),
    )
}
