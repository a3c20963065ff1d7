"""What the studies share: their command lines, how a run is opened, and how it ends."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.arguments import Parser
from benchmark.command import passed_on
from benchmark.settings import Settings, read_settings

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from benchmark.generate import Generated
    from benchmark.plan import Row
    from benchmark.runner import Workbench
    from benchmark.store import Store
    from benchmark.tables import Table


def study_parser(
    prog: str, description: str, passed: Mapping[str, Any], output: str, note: str | None = None
) -> Parser:
    """A parser of ``--output_dir``, ``--resume`` and the arguments that are passed on.

    Args:
        passed: name -> default; a list is for several values.
        output: where ``--output_dir`` is if it is not given.
        note: what the help says of the arguments that are passed on.
    """
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--output_dir", type=Path, metavar="DIR", help=f"new or empty ({output})")
    add("--resume", action="store_true", help="go on with an interrupted study")
    group = parser.add_argument_group("arguments of cache_execute.py", note)
    for name, default in passed.items():
        nargs = "+" if isinstance(default, list) else None
        group.add_argument(f"--{name}", metavar="X", nargs=nargs, default=default)
    return parser


def study_settings(given: Namespace, passed: Iterable[str], output: Path, *fixed: str) -> Settings:
    """The settings of the pictures; raises `BenchmarkError` for what is wrong.

    Args:
        given: with ``output_dir`` (None: FAMILY_STEPS below ``output``) and ``resume``.
        passed: names of the arguments that are passed on.
        fixed: further arguments of ``cache_execute.py``.
    """
    settings = read_settings(["--output_dir=.", *fixed, *passed_on(given, tuple(passed))])
    steps = settings.num_inference_steps[0]
    directory = given.output_dir or output / f"{settings.model_type}_{steps}"
    return replace(settings, output_dir=directory, resume=given.resume)


def identity_of(settings: Settings) -> dict[str, Any]:
    """`run_identity` of the settings as this process runs them."""
    from benchmark.cache_execute import run_identity
    from benchmark.loading import fingerprint
    from benchmark.runner import threads

    return run_identity(settings, fingerprint, threads(settings))


def kept_pictures(store: "Store", row: "Row", make: "Callable[[Row], Generated]") -> "Tensor":
    """The row's pictures, made if the store does not have them yet."""
    kept = store.pictures(row.key)
    if kept is None:
        kept = make(row).pictures
        store.save_pictures(row.key, kept)
    return kept


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStudy:
    """A study whose directory is its own and whose pipeline is loaded."""

    bench: "Workbench"
    bar: Any
    console: "Console"

    def make(self, row: "Row", bench: "Workbench | None" = None, said: str = "") -> "Generated":
        """The row's pictures, by another workbench if one is given; ``said`` of it meanwhile."""
        from benchmark.generate import generate_row

        bench = bench or self.bench
        self.bar.set_postfix_str(said or row.name)
        return generate_row(bench.pipe, bench.settings, row, bench.entries, self.bar.update)

    @property
    def psnr(self) -> Callable[[Any, Any], list[float]]:
        """PSNR in dB of each picture or clip."""
        from benchmark.metrics import psnr_db
        from benchmark.video_metrics import clip_psnr_db

        return psnr_db if self.bench.settings.num_frames is None else clip_psnr_db

    def write(
        self,
        found: Mapping[str, Any],
        render: Callable[[Mapping[str, Any]], str],
        tables: "Callable[[Mapping[str, Any]], Sequence[Table]]",
    ) -> None:
        """Write ``results.json`` and ``report.md`` with what was ``found``, and show its tables."""
        from benchmark.report import environment, write_study

        document = {
            "schema": 1,
            "environment": environment(self.bench),
            "settings": self.bench.settings.to_dict(),
            **found,
        }
        write_study(self.bench.store, document, render(document), tables(document), self.console)


@contextmanager
def opened(
    settings: Settings, console: "Console", identity: Mapping[str, Any], unit: str = "picture"
) -> Iterator[OpenStudy]:
    """Load the pipeline and take the directory; raises `BenchmarkError` before that.

    Args:
        identity: what has to be the same for finished rows to be used again, beside the settings.
        unit: what the progress bar counts.
    """
    from tqdm.auto import tqdm

    from benchmark.loading import load_prompts
    from benchmark.runner import Workbench
    from benchmark.store import Store

    Store(settings.output_dir).check(settings.resume)
    load_prompts(settings)
    console.print(f"Loading {settings.model}")
    bench = Workbench(settings)
    bench.store.open({**identity_of(settings), **identity}, settings.resume)
    with tqdm(desc=f"{unit}s", unit=unit, smoothing=0.05) as bar:
        yield OpenStudy(bench=bench, bar=bar, console=console)
