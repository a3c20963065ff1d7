"""Learning-to-Cache's router, trained on full runs of a pipeline."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.methods.l2c import ROUTER_FILE
from xfuser_adacorr.model_executor.cache.methods.options import check_count, check_number

from .files import output_path
from .module_file import save_table
from .module_runs import check_even, record_pairs, train, watched
from .runs import Prompts, full_runs

LOGIT_LIMIT = 5.0


def train_l2c(
    pipe: Any,
    prompts: Prompts,
    *,
    num_inference_steps: int,
    output: str | Path | None = None,
    iterations: int = 1400,
    learning_rate: float = 0.05,
    penalty: float = 5e-5,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> Path:
    """Train a router on ``prompts`` and store it beside the model; returns the path.

    The loss is ``MSE(full, mixed) + penalty * sum(beta)``, of outputs that are mixed as
    ``beta * fresh + (1 - beta) * cached`` with ``beta = sigmoid(r)``; r within +-5.

    Args:
        pipe: a pipeline without a cache.
        prompts: as of `calibrate`; a mapping may hold a batch.
        num_inference_steps: even.
        penalty: lambda; larger caches more.
        work: file that an interrupted training goes on from.
        call: arguments of the pipeline.

    Raises `ValueError` or `TypeError` that names the argument.
    """
    check_even(num_inference_steps)
    check_count("iterations", iterations, least=1)
    check_number("learning_rate", learning_rate, above=0)
    check_number("penalty", penalty, least=0)
    runs = full_runs(pipe, prompts, num_inference_steps=num_inference_steps, seed=seed, **call)
    path = output_path(runs.model, ROUTER_FILE, output)
    with watched(runs.model) as modules:
        pairs, places = record_pairs(runs, modules, progress)
        steps, count = len(places.steps), len(modules.places)
        rows = nn.ParameterList([nn.Parameter(torch.zeros(count)) for _ in range(steps)])
        losses = train(
            runs.model,
            modules,
            pairs,
            rows,
            lambda pair: [1.0 - beta for beta in torch.sigmoid(rows[pair.step])],
            lambda shares: penalty * sum(1.0 - share for share in shares),
            iterations=iterations,
            learning_rate=learning_rate,
            limit=LOGIT_LIMIT,
            seed=seed,
            work=None if work is None else Path(work),
            progress=progress,
        )
        names = [place.name for place in modules.places]
    logits = torch.stack([row.detach() for row in rows])
    logits[::2] = LOGIT_LIMIT
    settings = {**runs.settings, "iterations": iterations, "learning_rate": learning_rate}
    settings |= {"penalty": penalty, "last_loss": sum(losses[-50:]) / len(losses[-50:])}
    return save_table(path, "L2C", runs.model, names, places, {"logits": logits}, settings)
