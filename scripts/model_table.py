"""Write docs/models.md: which of diffusers' transformers run under which methods, by trying them.

Run it from the repository's root: ``python scripts/model_table.py``.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.stack_runs import METHODS, problem  # noqa: E402 - the root is on the path now
from tests.tiny_models import MODELS, UNTOLD  # noqa: E402
from xfuser_adacorr import cache_summary, disable_cache, enable_cache  # noqa: E402
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import (  # noqa: E402
    infer_family,
)

PAGE = ROOT / "docs" / "models.md"
NOT_TRIED = "not tried"
PARTS = ("Transformer2DModel", "DreamLiteTransformer2DModel", "TransformerTemporalModel")
"""Parts of U-Nets: no sampling loop calls them."""

HEAD = """# Models

This table is made by `python scripts/model_table.py`: it builds a tiny model of every transformer
class of diffusers {version}, runs it under each method, and writes down what happened.

- **Sampler step**: methods that skip whole sampling steps (Auto, Schedule, learned plans). They
  need nothing of the model but a pipeline that steps a scheduler, and were tried on one.
- **Fb, Tea, Ada, Fast**: methods that skip blocks. "yes" says that the model's outputs are equal
  bit for bit where the method may not reuse, that it executes fewer blocks where it may, that a
  reuse at equal inputs is right within {near:.0%}, and that the model is given back as it was.

What is needed of a model's blocks is inferred from the class and its first call; thresholds are the
same for all models that nobody has tuned. "not tried" stands where there is no tiny pipeline, or no
tiny model, of a class.
"""


@dataclass(frozen=True)
class Row:
    """What a class does: by method "yes", or the reason why not."""

    name: str
    results: dict[str, str]


def transformer_classes() -> list[str]:
    """Names of diffusers' transformers that are not ControlNets."""
    names = [
        name
        for name in dir(diffusers)
        if re.search(r"(Transformer\w*|DiT\w*)Model$|Transformer$", name)
        and not re.search(r"Flax|ControlNet", name)
    ]
    return sorted(names)


def stack_result(name: str, method: str) -> str:
    """ "yes", or why a class does not run under a stack method."""
    if name in PARTS:
        return "a part of U-Nets, which no sampling loop calls"
    try:
        if name in UNTOLD:
            infer_family(getattr(diffusers, name)(**UNTOLD[name]))
        if name not in MODELS:
            return NOT_TRIED
        return problem(name, method) or "yes"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def sampler_results() -> dict[str, str]:
    """Results of sampler-step methods by class of the denoiser, if there are tiny pipelines."""
    if find_spec("tests.pipelines") is None:
        return {}
    from tests.pipelines import CASES

    found: dict[str, list[str]] = defaultdict(list)
    for case in CASES.values():
        pipe = case.build()
        names = {type(getattr(pipe, denoiser)).__name__ for denoiser in case.denoisers}
        result = sampler_result(case, pipe)
        for name in names:
            found[name].append(result)
    return {
        name: "yes" if "yes" in results else results[0] for name, results in sorted(found.items())
    }


def sampler_result(case: Any, pipe: Any) -> str:
    """ "yes" if a pipeline skips sampling steps, or why it does not."""
    from tests.pipelines import run

    try:
        enable_cache(pipe, "Schedule", schedule=3, stand_in="forecast")
        output = run(case, pipe)
        summary = cache_summary(pipe)
        disable_cache(pipe)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not output.isfinite().all():
        return "its outputs are not finite"
    return "yes" if summary.computed_steps < summary.num_steps else "no step is skipped"


def row(name: str, sampler: dict[str, str]) -> Row:
    """Try a class; ``sampler`` holds the results of `sampler_results`."""
    step = sampler.get(name, NOT_TRIED)
    return Row(name, {"Sampler step": step, **{m: stack_result(name, m) for m in METHODS}})


def page(rows: Iterable[Row]) -> str:
    """The table, with a footnote for each reason."""
    rows = list(rows)
    reasons: list[str] = []

    def cell(result: str) -> str:
        if result in ("yes", NOT_TRIED):
            return result
        if result not in reasons:
            reasons.append(result)
        return f"no [{reasons.index(result) + 1}]"

    columns = list(rows[0].results)
    lines = [f"| class | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for each in rows:
        lines.append(f"| `{each.name}` | {' | '.join(map(cell, each.results.values()))} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    from tests.stack_runs import NEAR

    warnings.filterwarnings("ignore")
    sampler = sampler_results()
    rows = []
    with torch.no_grad():
        for name in transformer_classes():
            rows.append(row(name, sampler))
            print(name, *rows[-1].results.values(), sep=" | ", flush=True)
    head = HEAD.format(version=diffusers.__version__, near=NEAR)
    PAGE.write_text(f"{head}\n{page(rows)}")


if __name__ == "__main__":
    main()
