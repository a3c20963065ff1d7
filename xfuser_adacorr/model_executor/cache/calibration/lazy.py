"""LazyDiT's probes, trained on full runs of a pipeline, or taken from the published code's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.methods.lazy import PROBE_FILE
from xfuser_adacorr.model_executor.cache.methods.options import check_count, check_number
from xfuser_adacorr.model_executor.cache.schedulers import Places
from xfuser_adacorr.model_executor.cache.sites.modules import find_modules

from .files import output_path
from .module_file import save_table
from .module_runs import Pair, check_even, record_pairs, train, watched
from .runs import Prompts, full_runs


def laziness(sums: Sequence[Tensor], weights: Sequence[Tensor], samples: int) -> list[Tensor]:
    """s of every module and sample: ``sigmoid(sum_tokens Z . w)``."""
    logits = [
        z.view(samples, -1, z.shape[-1]).sum(1) @ w for z, w in zip(sums, weights, strict=True)
    ]
    return [torch.sigmoid(each) for each in logits]


def train_lazy(
    pipe: Any,
    prompts: Prompts,
    *,
    num_inference_steps: int,
    output: str | Path | None = None,
    iterations: int = 1400,
    learning_rate: float = 1e-4,
    penalty: float = 5e-5,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> Path:
    """Train probes on ``prompts`` and store them beside the model; returns the path.

    The loss is ``MSE(full, mixed) + penalty * sum(1 - s)``, the sum over modules of the mean over
    samples, of outputs mixed as ``(1 - s) * fresh + s * cached``. Arguments as of `train_l2c`;
    ``penalty`` is rho: larger caches more.
    """
    check_even(num_inference_steps)
    check_count("iterations", iterations, least=1)
    check_number("learning_rate", learning_rate, above=0)
    check_number("penalty", penalty, least=0)
    runs = full_runs(pipe, prompts, num_inference_steps=num_inference_steps, seed=seed, **call)
    path = output_path(runs.model, PROBE_FILE, output)
    with watched(runs.model) as modules:
        pairs, places = record_pairs(runs, modules, progress)
        widths = [z.shape[-1] for z in pairs[0].sums]
        steps = len(places.steps)
        probes = nn.ParameterList([nn.Parameter(torch.zeros(sum(widths))) for _ in range(steps)])

        def shares(pair: Pair) -> list[Tensor]:
            samples = min(len(z) for z in pair.sums)
            return laziness(pair.sums, probes[pair.step].split(widths), samples)

        losses = train(
            runs.model,
            modules,
            pairs,
            probes,
            shares,
            lambda lazy: penalty * sum((1.0 - s).mean() for s in lazy),
            iterations=iterations,
            learning_rate=learning_rate,
            limit=None,
            seed=seed,
            work=None if work is None else Path(work),
            progress=progress,
        )
        names = [place.name for place in modules.places]
    rows = [probe.detach().split(widths) for probe in probes]
    tensors = {str(m): torch.stack([row[m] for row in rows]) for m in range(len(widths))}
    settings = {**runs.settings, "iterations": iterations, "learning_rate": learning_rate}
    settings |= {"penalty": penalty, "last_loss": sum(losses[-50:]) / len(losses[-50:])}
    return save_table(path, "Lazy", runs.model, names, places, tensors, settings)


def convert_lazy(
    model: nn.Module, published: Tensor, places: Places, output: str | Path | None = None
) -> Path:
    """Store probes of the published code ``[T, blocks, 2, D]`` for ``model``; returns the path.

    Its steps are DDIM indices, which count down; its two modules a block are attention and
    feed-forward; and it computes where its sigmoid is at least 0.5, so that every weight changes
    its sign. Raises `ValueError` for other shapes than the model and ``places`` ask for.
    """
    modules = find_modules(model)
    steps, blocks, kinds, _ = published.shape
    if steps != len(places.steps) or blocks * kinds != len(modules):
        raise ValueError(
            f"published must be [{len(places.steps)}, {len(modules) // 2}, 2, D] for this model "
            f"and its steps, got {list(published.shape)}"
        )
    ours = -published.flip(0).flatten(1, 2).float()
    tensors = {str(m): ours[:, m].contiguous() for m in range(len(modules))}
    names = [place.name for place in modules]
    path = output_path(model, PROBE_FILE, output)
    return save_table(path, "Lazy", model, names, places, tensors, {"converted": True})
