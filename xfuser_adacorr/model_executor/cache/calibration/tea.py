"""TeaCache's polynomial: recorded in full runs, fitted, stored beside a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import TeaPolynomial
from xfuser_adacorr.model_executor.cache.methods.base import BlockCall, Signal
from xfuser_adacorr.model_executor.cache.signals import l1_sums, ratio
from xfuser_adacorr.model_executor.cache.sites.outputs import sample_of

from .files import calibration_path, fits_model, model_fingerprint, output_path, write_whole
from .recording import Recorder, recorded
from .runs import Prompts, full_runs

TEA_FILE = "teacache.json"
TEA_DEGREE = 4


def calibrate_tea(
    pipe: Any,
    prompts: Prompts,
    *,
    output: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fit TeaCache's polynomial on full runs and store it; ``options`` as in `full_runs`."""
    runs = full_runs(pipe, prompts, **options)
    path, recorder = output_path(runs.model, TEA_FILE, output), TeaRecorder()
    with recorded(recorder, pipe, runs.model, denoisers=(runs.denoiser,)):
        runs.sample(progress)
    save_tea_polynomial(path, fit_polynomial(recorder.changes), runs.model, runs.settings)
    return path


@dataclass(slots=True)
class TeaSeen:
    """What a branch's last call had."""

    signal: Tensor | None = None
    previous: tuple[Tensor, Tensor] | None = None
    """Signal and output of the call before."""


class TeaRecorder(Recorder):
    """Relative changes from call to call of a branch: of the signal, and of the model's output."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, float]] = []
        self._seen: TeaSeen | None = None
        """Of the branch that is being called."""

    def new_state(self) -> TeaSeen:
        return TeaSeen()

    def measure(self, state: TeaSeen, call: BlockCall) -> Signal:
        state.signal, self._seen = self.family.modulated_input(call.block, call.arguments), state
        return Signal()

    def returned(self, output: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is None:  # a call outside of a run
            return
        current = seen.signal, sample_of(output)
        if seen.previous is not None:
            pairs = zip(current, seen.previous, strict=True)
            x, y = (ratio(*torch.stack(l1_sums(*pair)).tolist()) for pair in pairs)
            self.changes.append((x, y))
        seen.previous = current


def fit_polynomial(changes: Sequence[tuple[float, float]]) -> TeaPolynomial:
    """Least-squares polynomial of degree 4 over the recorded changes (TeaCache, 3.3).

    Raises `ValueError` for too few changes.
    """
    if len(changes) <= TEA_DEGREE:
        raise ValueError(
            f"a fit needs more than {TEA_DEGREE} changes, got {len(changes)}; give more prompts "
            "or steps"
        )
    x, y = np.array(changes).T
    coefficients = np.polynomial.Polynomial.fit(x, y, TEA_DEGREE).convert().coef[::-1]
    return TeaPolynomial(
        coefficients=tuple(map(float, coefficients)), domain=(float(x.min()), float(x.max()))
    )


def save_tea_polynomial(
    path: Path, polynomial: TeaPolynomial, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write TeaCache's polynomial with the model's fingerprint and how it was fitted."""
    content = {
        "method": "Tea",
        "fingerprint": model_fingerprint(transformer),
        "coefficients": polynomial.coefficients,
        "domain": polynomial.domain,
        "settings": dict(settings),
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def load_tea_polynomial(transformer: nn.Module, given: str | None) -> TeaPolynomial | None:
    """Read TeaCache's polynomial; None where there is none of this model (`fits_model`)."""
    path = calibration_path(transformer, TEA_FILE, given)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        polynomial = TeaPolynomial(
            coefficients=tuple(float(c) for c in content["coefficients"]),
            domain=tuple(float(x) for x in content["domain"]),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"calibration: {path} is not a TeaCache calibration ({error})") from error
    return polynomial if fits_model(path, content, "Tea", transformer, given) else None
