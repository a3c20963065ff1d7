"""The verb `calibrate`: fit what a method can be fitted with, on full runs of a pipeline."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .ada import calibrate_ada
from .eoc import fit_eoc
from .fast import calibrate_fast
from .l2c import train_l2c
from .lazy import train_lazy
from .learned import calibrate_learned
from .runs import Prompts
from .tea import calibrate_tea

CALIBRATIONS: dict[str, Callable[..., Path]] = {
    "Tea": calibrate_tea,
    "Fast": calibrate_fast,
    "Ada": calibrate_ada,
    "Learned": calibrate_learned,
    "L2C": train_l2c,
    "Lazy": train_lazy,
    "EOC": fit_eoc,
}
"""By the method's name: ``function(pipe, prompts, *, num_inference_steps, output, ..., **call)``,
which returns the path of the file it wrote."""
COMMON = ("seed", "progress")
"""Options that all of them have."""


def calibrate(
    pipe: Any,
    method: str,
    prompts: Prompts,
    *,
    num_inference_steps: int,
    output: str | Path | None = None,
    **options: Any,
) -> Path:
    """Fit a method to a pipeline's model on full runs, and store the result beside its weights.

    There `enable_cache` finds it by itself, for this model alone: the file holds a fingerprint of
    the weights. Each prompt is sampled once, with noise of its own seed.

    Args:
        pipe: a pipeline without a cache, whose transformer has blocks that are known or inferred.
        method: ``Tea`` (the polynomial), ``Fast`` (linear maps in the place of blocks), ``Ada``
            (the codebook), ``L2C`` (`train_l2c`), ``Lazy`` (`train_lazy`), ``EOC`` (`fit_eoc`) or
            ``Learned`` (schedules and coefficients: `calibrate_learned`, which samples the prompts
            more than once); the last four have options of their own.
        prompts: texts, or mappings with the arguments of one call each (``{"class_labels": [3]}``),
            which may hold a ``seed``.
        num_inference_steps: sampling steps, as the pipeline is to be called.
        output: a file, or a directory for it; None: beside the model's weights.
        options: ``seed`` (0; each prompt's place is added), ``denoiser`` (name of the component;
            None: the transformer), ``progress`` (True: show a bar); for ``Ada``
            ``compute_fraction`` (0.5: about the share of the calls to be computed, the first and
            the last two come on top) and ``rates`` (6 to 1: steps from a computed call to the
            next); all others are arguments of the pipeline (``guidance_scale``, ``height``, ...).

    Returns the path of the file. Raises `ValueError` or `TypeError` that names the argument, for a
    model whose blocks are not known, too few changes to fit, and where a cache is enabled;
    `FileNotFoundError` if ``output`` is in no directory.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, got {method!r}")
    if method not in CALIBRATIONS:
        raise ValueError(f"method must be one of {', '.join(CALIBRATIONS)}, got {method!r}")
    for name in options:
        takers = [label for label, fit in CALIBRATIONS.items() if name in _own_options(fit)]
        if name not in COMMON and takers and method not in takers:
            raise ValueError(f"{name} is an option of {', '.join(takers)}, not of {method}")
    return CALIBRATIONS[method](
        pipe, prompts, num_inference_steps=num_inference_steps, output=output, **options
    )


def _own_options(fit: Callable[..., Path]) -> set[str]:
    parameters = inspect.signature(fit).parameters.values()
    return {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
