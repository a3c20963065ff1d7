"""EOC: reused module outputs are moved by what they changed in earlier runs."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .fora import FORA, EveryNth
from .modular import ModuleState
from .options import check_choice

PRIOR_FILE = "eoc.safetensors"
FORMS = ("additive", "relative")
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class EOC(FORA):
    """FORA with an error-optimised cache: ``f + theta * e``, ``e = A[t] - A[source]``.

    A are the modules' mean outputs over prior runs; theta was fitted for this ``interval``, and is
    0 where the correction did not help on runs that were held out. The relative form is
    ``f * (1 + theta * clip(e / A[source], -1, 1))``. Raises as `L2C` does.
    """

    label: ClassVar[str] = "EOC"

    form: str = "additive"
    """``additive`` or ``relative``."""
    prior: str | None = None
    """File of the prior; None: ``eoc.safetensors`` beside the model."""
    loaded: Any = field(default=None, repr=False, compare=False)
    """The `ModuleTable` that was read."""

    def __post_init__(self) -> None:
        FORA.__post_init__(self)
        check_choice("form", self.form, FORMS)

    def bound_to(self, model: Any) -> "EOC":
        from xfuser_adacorr.model_executor.cache.calibration.module_file import load_table

        table = load_table(model, self.prior, PRIOR_FILE, "EOC")
        if f"theta.{self.interval}.{self.form}" not in table.tensors:
            fitted = sorted({int(n.split(".")[1]) for n in table.tensors if n.startswith("theta")})
            raise ValueError(
                f"interval must be one that {table.path} was fitted for, {fitted}, got "
                f"{self.interval}"
            )
        return replace(self, loaded=table)

    def make_modules(self) -> "Optimised":
        return Optimised(self.interval, self.form, self.loaded)


def trend(form: str, cached: Tensor, then: Tensor, now: Tensor) -> Tensor:
    """What theta is the factor of; ``then`` and ``now`` are mean outputs ``[parts, D]``, of which
    each holds for as many rows of ``cached`` ``[rows, N, D]``."""
    error = now - then
    if form == "relative":
        error = (error / (then + EPSILON)).clamp(-1.0, 1.0)
    rows = error.repeat_interleave(cached.shape[0] // error.shape[0], 0)
    rows = rows.view(rows.shape[0], *[1] * (cached.ndim - 2), -1).to(cached)
    return cached * rows if form == "relative" else rows.expand_as(cached)


class Optimised(EveryNth):
    """`EveryNth` with corrected reuse."""

    def __init__(self, interval: int, form: str, table: Any) -> None:
        super().__init__(interval)
        self.form, self.table = form, table
        self.theta = table.tensors[f"theta.{interval}.{form}"].tolist()
        self._branches = 0

    def bind(self, model, places) -> None:
        self.table.check_modules([place.name for place in places])
        EveryNth.bind(self, model, places)

    def begin_run(self, places) -> None:
        self.table.check(places)
        self._branches = 0

    def named(self, state: ModuleState, branch: str) -> None:
        state.notes["branch"] = self._branches
        self._branches += 1

    def computed(self, state: ModuleState, call: Any) -> Any:
        state.notes["source", call.key] = state.step.index
        return EveryNth.computed(self, state, call)

    def reused(self, state: ModuleState, call: Any) -> Any:
        index, step = call.place.index, state.step.index
        theta, out = self.theta[step][index], state.outputs[call.key]
        if theta == 0.0:
            return out
        prior = self.table.tensors[f"mean.{index}"][:, state.notes["branch"]].to(out.device)
        then, now = prior[state.notes["source", call.key]].float(), prior[step].float()
        return out + theta * trend(self.form, out, then, now)


def fitted_theta(products: Tensor, squares: Tensor) -> Tensor:
    """Least squares: theta of ``d ~ theta * b``, from ``<d, b>`` and ``<b, b>``."""
    return torch.where(squares > 0.0, products / squares.clamp_min(1e-30), 0.0)
