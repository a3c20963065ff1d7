"""What caching costs in half precision, beside what half precision costs by itself.

Methods run in several weights' types; each is compared with the uncached pictures of its own type,
and with those of float32. `--help` lists the arguments.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402

from benchmark.arguments import Parser  # noqa: E402
from benchmark.command import run_command  # noqa: E402
from benchmark.method_names import UNCACHED  # noqa: E402
from benchmark.study import opened, study_parser, study_settings  # noqa: E402

OUTPUT = ROOT / "benchmark" / "results" / "precision"
EXACT = "float32"
PASSED_ON = {
    "model_type": "flux",
    "model": None,
    "prompts": None,
    "judge": None,
    "config": None,
    "cache_methods": ["Auto", "Fb+AdaCorrection", "Fb"],
    "num_inference_steps": None,
    "guidance_scale": None,
    "true_cfg_scale": None,
    "device": None,
    "threads": None,
    "split": "development",
    "num_prompts": "3",
}
"""Name -> default."""


def make_parser() -> Parser:
    parser = study_parser(
        "precision.py",
        "Cached and uncached pictures in half precision and in float32.",
        PASSED_ON,
        "benchmark/results/precision/FAMILY_STEPS",
        "The split is the development split by default, of which 3 prompts are taken.",
    )
    parser.add_argument(
        "--half",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="half precision type (bfloat16; float16 takes a GPU to be quick)",
    )
    return parser


def measure(
    store: Any,
    rows: Sequence[Any],
    dtypes: Sequence[str],
    make: Callable[[str, Any], Any],
    psnr: Callable[[Any, Any], list[float]],
) -> list[dict[str, Any]]:
    """Compute fraction, and PSNR to both uncached runs, of every row in every type.

    The first row is the uncached one, the first type float32; ``make(dtype, row)`` makes pictures,
    `generate.Generated`. Every row is kept as soon as it is finished.
    """
    from benchmark.metrics import spread

    uncached, results = rows[0], []
    for dtype in dtypes:
        for row in rows:
            key = f"{dtype}-{row.key}"
            kept = store.row(key)
            if kept is None:
                made = make(dtype, row)
                if row is uncached:
                    store.save_pictures(key, made.pictures)
                own, exact = (store.pictures(f"{of}-{uncached.key}") for of in (dtype, dtypes[0]))
                is_exact = row is uncached and dtype == dtypes[0]
                fractions = [summary.compute_fraction for summary in made.summaries]
                kept = {
                    "dtype": dtype,
                    "cache_method": row.name,
                    "compute_fraction": round(fmean(fractions), 6) if fractions else 1.0,
                    "psnr_db": None if row is uncached else spread(psnr(made.pictures, own)),
                    "psnr_exact_db": None if is_exact else spread(psnr(made.pictures, exact)),
                    "config": row.config and row.config.to_dict(),
                }
                store.save_row(key, kept)
            results.append(kept)
    return results


def table(results: Sequence[Mapping[str, Any]]) -> Any:
    """One line a type and method."""
    from benchmark.tables import MISSING, Table, number

    def psnr(value: Mapping[str, float] | None) -> str:
        return MISSING if value is None else f"{value['mean']:.1f} (min {value['min']:.1f})"

    heads = ("type", "method", "compute", "PSNR dB to its uncached", f"to {EXACT} uncached")
    cells = [
        (
            result["dtype"],
            "uncached" if result["cache_method"] == UNCACHED else result["cache_method"],
            number(result["compute_fraction"], 3),
            psnr(result["psnr_db"]),
            psnr(result["psnr_exact_db"]),
        )
        for result in results
    ]
    return Table("Caching in half precision", heads, cells)


def render(document: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings = document["settings"]
    environment = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    return (
        f"# Caching in half precision\n\nModel `{settings['model']}`, {len(document['prompts'])} "
        f"prompts of the {settings['split']} split, {settings['num_inference_steps'][0]} steps.\n\n"
        f"{table(document['results']).markdown()}\n"
        "- PSNR: mean and minimum over the pictures, against the uncached picture of the same type "
        "and against that of float32. The uncached line of the half precision type is what the "
        "type costs by itself.\n"
        f"- Environment: {environment}.\n"
    )


def run(argv: Sequence[str], console: Console) -> None:
    """Make all pictures, then write ``results.json`` and ``report.md``."""
    given = make_parser().parse_args(argv)
    settings = study_settings(given, PASSED_ON, OUTPUT)

    from benchmark.families import FAMILIES
    from benchmark.loading import load_documented
    from benchmark.plan import comparison_rows
    from benchmark.runner import Workbench

    rows = comparison_rows(
        settings.cache_methods,
        settings.num_inference_steps[:1],
        load_documented(settings),
        {},
        FAMILIES[settings.model_type].solvers,
    )
    with opened(settings, console, {"half": given.half}) as session:
        bench = session.bench
        benches = {EXACT: bench, given.half: Workbench(replace(settings, dtype=given.half))}

        def make(dtype: str, row: Any) -> Any:
            return session.make(row, benches[dtype], said=f"{dtype} {row.name}")

        found = {
            "settings": {**settings.to_dict(), "dtype": list(benches)},
            "prompts": bench.entries,
            "results": measure(bench.store, rows, list(benches), make, session.psnr),
        }
    session.write(found, render, lambda document: [table(document["results"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake of the user's, 130 if interrupted."""
    return run_command(run, argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
