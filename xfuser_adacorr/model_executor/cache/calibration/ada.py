"""AdaCache's codebook: changes recorded in full runs, fitted, stored beside a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from torch import nn

from xfuser_adacorr.model_executor.cache.api import disable_cache, enable_cache, site_of
from xfuser_adacorr.model_executor.cache.methods.ada import Ada
from xfuser_adacorr.model_executor.cache.methods.codebook import Codebook

from .files import calibration_path, fits_model, model_fingerprint, output_path, write_whole
from .runs import Prompts, full_runs

ADA_FILE = "adacache.json"
RATES = (6, 5, 4, 3, 2, 1)
LEAST_CHANGES_PER_RATE = 4
_EVERY_STEP = ((1.0, 1),)
_STEEPEST = 60.0


def calibrate_ada(
    pipe: Any,
    prompts: Prompts,
    *,
    compute_fraction: float = 0.5,
    rates: Sequence[int] = RATES,
    output: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fit AdaCache's codebook on full runs and store it; ``options`` as in `full_runs`."""
    runs = full_runs(pipe, prompts, **options)
    step_shares(compute_fraction, rates)  # raises before the runs
    path = output_path(runs.model, ADA_FILE, output)
    with recorded_changes(pipe, denoisers=(runs.denoiser,)) as changes:
        runs.sample(progress)
    codebook = fit_codebook(changes, compute_fraction, rates)
    settings = {**runs.settings, "compute_fraction": compute_fraction}
    save_ada_codebook(path, codebook, runs.model, settings)
    return path


@contextmanager
def recorded_changes(x: Any, **options: Any) -> Iterator[list[float]]:
    """The list that takes in what Ada measures from step to step, while every call is computed.

    ``x`` is a pipeline or a model, ``options`` are those of `enable_cache`.
    """
    changes: list[float] = []
    enable_cache(x, Ada(codebook=_EVERY_STEP), **options)
    for stack in site_of(x).stacks.values():
        stack.method.observe = changes.append
    try:
        yield changes
    finally:
        disable_cache(x)


def fit_codebook(
    changes: Sequence[float], compute_fraction: float, rates: Sequence[int] = RATES
) -> Codebook:
    """Thresholds that make ``rates`` cover the shares of `step_shares`, slowest change first.

    A computed call with rate r covers r steps, so its thresholds are quantiles of c over steps.
    Raises `ValueError` for a fraction that the rates cannot reach, or too few changes.
    """
    rates = sorted(set(rates), reverse=True)
    shares = step_shares(compute_fraction, rates)
    least = LEAST_CHANGES_PER_RATE * len(rates)
    if len(changes) < least:
        raise ValueError(
            f"a codebook of {len(rates)} rates needs at least {least} changes, got "
            f"{len(changes)}; give more prompts or steps"
        )
    thresholds = np.quantile(changes, np.cumsum(shares)[:-1]).tolist()
    above_all = max(1.0, 2.0 * max(changes))
    return Codebook.of(list(zip([*thresholds, above_all], rates, strict=True)))


def step_shares(compute_fraction: float, rates: Sequence[int]) -> np.ndarray:
    """Share of all steps that each rate covers: ``sum(share / rate)`` is the compute fraction.

    Of the many choices the shares are those that change by the same factor from rate to rate + 1.
    Raises `ValueError` naming the range of fractions that ``rates`` can reach.
    """
    rate = np.array(rates, dtype=float)
    least, most = 1.0 / rate.max(), 1.0 / rate.min()
    if not least < compute_fraction < most:
        raise ValueError(
            f"compute_fraction must be between {least:.3f} and {most:.3f} for rates "
            f"{', '.join(map(str, rates))}, got {compute_fraction}"
        )

    def shares(slope: float) -> np.ndarray:
        weights = np.exp(slope * rate - (slope * rate).max())
        return weights / weights.sum()

    def excess(slope: float) -> float:
        return (shares(slope) / rate).sum() - compute_fraction

    return shares(brentq(excess, -_STEEPEST, _STEEPEST, xtol=1e-12 * _STEEPEST))


def save_ada_codebook(
    path: Path, codebook: Codebook, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write AdaCache's codebook with the model's fingerprint and how it was fitted."""
    content = {
        "method": "Ada",
        "fingerprint": model_fingerprint(transformer),
        "codebook": codebook.entries,
        "settings": dict(settings),
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_ada_codebook(transformer: nn.Module, given: str | None) -> Codebook | None:
    """Read AdaCache's codebook; None where there is none of this model (`fits_model`)."""
    path = calibration_path(transformer, ADA_FILE, given)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        codebook = Codebook.of(content["codebook"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"calibration: {path} is not an AdaCache calibration ({error})") from error
    return codebook if fits_model(path, content, "Ada", transformer, given) else None
