"""The paper's table on a small pipeline: base methods, plain and corrected at equal compute.

Samples are made in batches, and every batch of every row is kept as soon as it is finished, so that
an interrupted run goes on, and a longer one goes on from a shorter one.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.models.loading import call_arguments, entry_text, load_documented
from benchmark.models.names import CORRECTED, changed
from benchmark.report.tables import Table
from benchmark.run.generate import prepared
from benchmark.run.rows import Row, cached_row, uncached_row
from benchmark.score.bands import CONFIDENCE
from benchmark.score.pictures import frechet_distance
from benchmark.score.samples import draws, resampled_distances
from benchmark.settings import Settings
from benchmark.studies.catalogue import PAPER_GROUPS, PaperTableOptions
from benchmark.studies.session import OpenStudy, opened
from xfuser_adacorr import CacheConfig, cache_summary

PAPER = ("Fast", "Tea", "Ada", "Lazy", "Fb")
"""Base methods, in the order of the paper's table."""
THRESHOLDS = {
    ("dit", 28): {"Fast": 0.028, "Tea": 0.036, "Ada": 0.95, "Fb": 0.31},
    ("pixart", 20): {"Fast": 0.052, "Tea": 0.095, "Ada": 1.4, "Fb": 0.38},
}
"""About 0.4 of the compute, as the sweeps of `pareto` found it; else the documented ones."""
MODULES = (
    ("FORA", {"interval": 2}),
    ("FORA", {"interval": 3}),
    ("L2C", {}),
    ("L2C", {"compute": 0.5357}),
    ("ToCa", {"interval": 2}),
    ("ToCa", {"interval": 4}),
    ("ToCa", {"interval": 14}),
)
RIVALS = (
    ("EOC", {"interval": 2}),
    ("EOC", {"interval": 3}),
    ("EOC", {"interval": 3, "form": "relative"}),
    ("GOC", {"interval": 2}),
    ("GOC", {"interval": 3}),
)
SENSITIVITY = (0.5, 1.0, 2.0)
TOLERANCES = {("dit", 28): 0.02, ("pixart", 20): 0.1}
"""What gamma and lambda are varied at, about 0.4 of the compute too; else the documented one."""
FIRST_FREE_SEED = 50_000
"""Samples beyond the prompts of a split take these seeds."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A row; a corrected one has the compute of its base row."""

    label: str
    group: str
    name: str
    options: Mapping[str, Any]
    like: str | None = None
    """Label of the row whose compute it takes."""


def _labelled(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{k} {v}" for k, v in options.items())])


def asked_rows(settings: Settings, options: PaperTableOptions) -> list[Asked]:
    """All rows but the uncached one, base methods before their corrections."""
    steps = settings.num_inference_steps[0]
    thresholds = THRESHOLDS.get((settings.model_type, steps), {})
    documented = load_documented(settings)
    rows = []
    for name in PAPER:
        own: dict[str, Any] = {}
        if name in thresholds:
            own = {"rel_l1_thresh": thresholds[name]}
        elif name in documented:
            own = {"rel_l1_thresh": documented[name].threshold}
        rows += _pair("table", name, name, own)
    budget = {"target_compute": options.compute}
    rows.append(Asked("Auto", "table", "Auto", {**budget, "use_plan": False}))
    rows.append(Asked("Learned", "table", "Learned", budget))
    for name, own in MODULES:
        rows += _pair("modules", _labelled(name, own), name, own)
    rows += [Asked(_labelled(n, own), "rivals", n, own) for n, own in RIVALS]
    tolerance: dict[str, Any] = {}
    if (settings.model_type, steps) in TOLERANCES:
        tolerance = {"adacorr_tolerance": TOLERANCES[settings.model_type, steps]}
    for value in SENSITIVITY:
        for flat in ("adacorr_gamma", "adacorr_lambda"):
            if value != 1.0 or flat == "adacorr_gamma":
                label = f"Auto, {flat.removeprefix('adacorr_')} {value:g}"
                rows.append(Asked(label, "sensitivity", "Auto", {**tolerance, flat: value}))
    return [row for row in rows if row.group in options.groups]


def _pair(group: str, label: str, name: str, options: Mapping[str, Any]) -> list[Asked]:
    correction = {k: v for k, v in options.items() if k != "rel_l1_thresh"}
    return [
        Asked(label, group, name, options),
        Asked(label + CORRECTED, group, name + CORRECTED, correction, like=label),
    ]


def sample_entries(entries: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """As many prompts with seeds: those given, then the same ones over again with other seeds."""
    return [
        dict(entries[i])
        if i < len(entries)
        else {**entries[i % len(entries)], "seed": FIRST_FREE_SEED + i}
        for i in range(number)
    ]


def make_batch(session: OpenStudy, row: Row, entries: Sequence[Mapping[str, Any]]) -> dict:
    """Pictures of one batch, what they cost, and how long it took (of the CPU, where it is one)."""
    bench = session.bench
    pipe, settings = bench.pipe, bench.settings
    generators = [torch.Generator().manual_seed(entry["seed"]) for entry in entries]
    arguments = call_arguments(settings, pipe, [entry_text(entry) for entry in entries])
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with prepared(pipe, row), torch.no_grad():
        start = clock()
        output = pipe(
            **arguments,
            num_inference_steps=row.num_inference_steps,
            generator=generators,
            output_type="pt",
        )
        seconds = clock() - start
        fraction = 1.0 if row.config is None else cache_summary(pipe).compute_fraction
    pictures = next(iter(output.values()))  # of all entries
    return {"pictures": pictures.float().cpu(), "seconds": seconds, "compute": fraction}


class Batches:
    """Makes and keeps the batches of rows."""

    def __init__(self, session: OpenStudy, entries: Sequence[dict], size: int) -> None:
        self.session, self.store = session, session.bench.store
        self.batches = [entries[i : i + size] for i in range(0, len(entries), size)]

    def kept(self, row: Row, index: int) -> dict[str, Any]:
        """The figures of a batch; it is made if it is not there yet."""
        name = f"{row.key}-{index}"
        found = self.store.row(name)
        if found is None:
            self.session.bar.set_postfix_str(f"{row.name}, batch {index}")
            made = make_batch(self.session, row, self.batches[index])
            pictures = made.pop("pictures")
            if row.config is None:
                self.store.save_pictures(f"uncached-{index}", pictures)
            reference = self.store.pictures(f"uncached-{index}")
            scorer = self.session.bench.scorer
            texts = [entry_text(entry) for entry in self.batches[index]]
            found = {**made, "psnr": [round(x, 3) for x in self.session.psnr(pictures, reference)]}
            if scorer.judge is not None:
                self.store.save_pictures(f"{name}-features", scorer.features_of(pictures))
                accuracy = scorer.judging.accuracy(scorer.judge, pictures, texts)
                found["accuracy"] = accuracy["whole"]
            self.store.save_row(name, found)
            self.session.bar.update(len(texts))
        return found

    def features(self, row: Row, count: int) -> Tensor | None:
        parts = [self.store.pictures(f"{row.key}-{i}-features") for i in range(count)]
        return None if any(part is None for part in parts) else torch.cat(parts)


def result_of(batches: Batches, asked: Asked | None, row: Row, count: int) -> dict[str, Any]:
    """A line of the table, from the first ``count`` batches."""
    made = [batches.kept(row, i) for i in range(count)]
    sizes = [len(batch) for batch in batches.batches[:count]]
    psnr = torch.tensor([x for each in made for x in each["psnr"]])
    compute = fmean(each["compute"] for each in made)
    found = {
        "row": "uncached" if asked is None else asked.label,
        "group": "table" if asked is None else asked.group,
        "config": row.config and row.config.to_dict(),
        "compute_fraction": round(compute, 4),
        "hit_rate": round(1.0 - compute, 4),
        "fps": round(sum(sizes) / sum(each["seconds"] for each in made), 4),
        "psnr_db": None if asked is None else _with_band(psnr, psnr[draws(len(psnr))].mean(1)),
        "psnr_of_each": None if asked is None else psnr.tolist(),
        "judge_distance": None,
        "prompt_accuracy": None,
    }
    features = batches.features(row, count)
    if features is not None:
        real = batches.session.bench.scorer.real
        distance = torch.tensor(frechet_distance(features, real))
        resampled = resampled_distances(features, real)
        # repeated pictures raise it: the band is moved to where the value is
        band = resampled - resampled.mean() + distance
        found["judge_distance"] = _with_band(distance[None], band)
        shares = [each["accuracy"] * n for each, n in zip(made, sizes, strict=True)]
        found["prompt_accuracy"] = round(sum(shares) / sum(sizes), 4)
    return found


def _with_band(values: Tensor, resampled: Tensor) -> list[float]:
    """Mean, and the ends of the percentile interval."""
    tail = (1 - CONFIDENCE) / 2
    ends = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail]).double())
    return [round(float(values.mean()), 3), *(round(x, 3) for x in ends.tolist())]


def table(document: Mapping[str, Any]) -> Table:
    """One line a row."""
    heads = ("row", "compute", "hit rate", "PSNR dB", "judge distance", "prompts", "FPS")
    cells = []
    for found in document["results"]:
        psnr, distance, accuracy = (
            found[name] for name in ("psnr_db", "judge_distance", "prompt_accuracy")
        )
        cells.append(
            (
                found["row"],
                f"{found['compute_fraction']:.3f}",
                f"{100 * found['hit_rate']:.1f} %",
                "" if psnr is None else f"{psnr[0]:.1f} ({psnr[1]:.1f} to {psnr[2]:.1f})",
                ""
                if distance is None
                else f"{distance[0]:.1f} ({distance[1]:.1f} to {distance[2]:.1f})",
                "" if accuracy is None else f"{accuracy:.3f}",
                f"{found['fps']:.3f}",
            )
        )
    return Table(f"{document['samples']} samples a row", heads, cells)


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings = document["settings"]
    environment = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    steps = settings["num_inference_steps"][0]
    groups = dict.fromkeys(row["group"] for row in document["results"][1:])  # the first: uncached
    return (
        f"# The paper's table on a small pipeline\n\nModel `{settings['model']}`, "
        f"{steps} steps, {document['samples']} samples in batches of "
        f"{document['batch_size']}; `python -m benchmark paper_table --model_type "
        f"{settings['model_type']} --num_inference_steps {steps} --samples {document['samples']} "
        f"--batch_size {document['batch_size']} --groups {' '.join(groups)}`.\n\n"
        f"{table(document).markdown()}\n"
        "- Compute: denoiser calls, or within them blocks or the FLOPs of modules, that were "
        "executed, over all. A corrected row has its base row's compute of the first batch as "
        "`target_compute`. Decisions are a batch's.\n"
        "- PSNR against the uncached pictures, judge distance to rendered ones, each with the 95 % "
        "band of a bootstrap over the samples. Prompts: share of pictures that the judge finds "
        "wholly right. FPS: pictures a second of process time, decoding included.\n"
        f"- {document['left_out'] or 'No row was left out.'}\n"
        f"- Environment: {environment}.\n"
    )


def run(settings: Settings, options: PaperTableOptions, console: Console) -> None:
    """Make all batches that are missing, then write ``results.json`` and ``report.md``."""
    steps, solver = settings.num_inference_steps[0], FAMILIES[settings.model_type].solvers[0]
    asked, left_out = asked_rows(settings, options), []
    with opened(settings, console, {"batch_size": options.batch_size}, "sample") as session:
        entries = sample_entries(session.bench.entries, options.samples)
        batches = Batches(session, entries, options.batch_size)
        uncached, rows = uncached_row(steps, solver), {}
        batches.kept(uncached, 0)
        for each in sorted(asked, key=lambda row: row.group in ("table", "sensitivity")):
            config = CacheConfig.from_name(each.name, **each.options)
            if each.like is not None:
                if each.like not in rows:
                    continue
                compute = batches.kept(rows[each.like][1], 0)["compute"]
                config = changed(config, target_compute=round(min(compute, 1.0), 4))
            row = cached_row(each.name, steps, config, solver)
            try:
                batches.kept(row, 0)
            except (BenchmarkError, ValueError) as error:
                left_out.append(f"{each.label} ({error})")
                continue
            rows[each.label] = each, row
        for index in range(1, len(batches.batches)):
            for row in (uncached, *(row for _, row in rows.values())):
                batches.kept(row, index)
        count = len(batches.batches)
        made = sorted(rows.values(), key=lambda pair: PAPER_GROUPS.index(pair[0].group))
        lines = [(None, uncached), *made]
        found = {
            "samples": options.samples,
            "batch_size": options.batch_size,
            "left_out": f"Left out: {'; '.join(left_out)}." if left_out else "",
            "results": [result_of(batches, each, row, count) for each, row in lines],
        }
    session.write(found, render, lambda document: [table(document)])
