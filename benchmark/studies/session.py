"""What the studies share: how a run is opened, how its rows are kept, and how it ends."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm

from benchmark.models.loading import fingerprint, load_prompts
from benchmark.report.comparison import environment, write_study
from benchmark.report.tables import Table
from benchmark.run.generate import Generated, generate_row
from benchmark.run.rows import Row
from benchmark.run.store import Store
from benchmark.run.workbench import Workbench, threads
from benchmark.score.clips import clip_psnr_db
from benchmark.score.pictures import psnr_db
from benchmark.settings import ROOT, Settings


def run_identity(settings: Settings) -> dict[str, Any]:
    """What has to be the same for finished rows to be used again."""
    identity = settings.to_dict()
    for name in ("resume", "workers"):
        del identity[name]
    model = Path(settings.model).expanduser()
    identity["threads"] = threads(settings)
    identity["model files"] = fingerprint(model) if model.is_dir() else None
    identity["library files"] = fingerprint(ROOT / "xfuser_adacorr")
    return identity


def kept_pictures(store: Store, row: Row, make: Callable[[Row], Generated]) -> Tensor:
    """The row's pictures, made if the store does not have them yet."""
    kept = store.pictures(row.key)
    if kept is None:
        kept = make(row).pictures
        store.save_pictures(row.key, kept)
    return kept


def compared_pictures(
    row: Row, made: Generated, reference: Tensor, psnr: Callable[[Any, Any], list[float]]
) -> dict[str, Any]:
    """Of every picture of a row the compute fraction, and the PSNR in dB to the uncached one."""
    return {
        "compute_fraction": [round(s.compute_fraction, 6) for s in made.summaries],
        "psnr_db": [round(value, 4) for value in psnr(made.pictures, reference)],
        "config": row.config.to_dict(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStudy:
    """A study whose directory is its own and whose pipeline is loaded."""

    bench: Workbench
    bar: Any
    console: Console

    def make(self, row: Row, bench: Workbench | None = None, said: str = "") -> Generated:
        """The row's pictures, by another workbench if one is given; ``said`` of it meanwhile."""
        bench = bench or self.bench
        self.bar.set_postfix_str(said or row.name)
        return generate_row(bench.pipe, bench.settings, row, bench.entries, self.bar.update)

    @property
    def psnr(self) -> Callable[[Any, Any], list[float]]:
        """PSNR in dB of each picture or clip."""
        return psnr_db if self.bench.settings.num_frames is None else clip_psnr_db

    def write(
        self,
        found: Mapping[str, Any],
        render: Callable[[Mapping[str, Any]], str],
        tables: Callable[[Mapping[str, Any]], Sequence[Table]],
    ) -> None:
        """Write ``results.json`` and ``report.md`` with what was ``found``, and show its tables."""
        document = {
            "schema": 1,
            "environment": environment(self.bench),
            "settings": self.bench.settings.to_dict(),
            **found,
        }
        write_study(self.bench.store, document, render(document), tables(document), self.console)


@contextmanager
def opened(
    settings: Settings, console: Console, identity: Mapping[str, Any], unit: str = "picture"
) -> Iterator[OpenStudy]:
    """Load the pipeline and take the directory; raises `BenchmarkError` before that.

    Args:
        identity: what has to be the same for finished rows to be used again, beside the settings.
        unit: what the progress bar counts.
    """
    Store(settings.output_dir).check(settings.resume)
    load_prompts(settings)
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    bench.store.open({**run_identity(settings), **identity}, settings.resume)
    with tqdm(desc=f"{unit}s", unit=unit, smoothing=0.05) as bar:
        yield OpenStudy(bench=bench, bar=bar, console=console)
