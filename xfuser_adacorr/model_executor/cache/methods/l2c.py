"""Learning-to-Cache: a learned table says which modules are computed in which step."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .modular import ModuleMethod, ModuleOptions
from .options import check_number

ROUTER_FILE = "l2c.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class L2C(ModuleOptions):
    """Compute module m in step t iff ``sigmoid(r[t, m]) > theta`` (arXiv 2406.01733).

    The steps are taken in pairs: the first computes everything, the second may reuse it. Raises
    `FileNotFoundError` when enabled if there is no router, `ValueError` for another model's, and on
    the first call for another sampler or other steps.
    """

    label: ClassVar[str] = "L2C"

    router: str | None = None
    """File of the trained table; None: ``l2c.safetensors`` beside the model."""
    theta: float = 0.1
    """In [0, 1]; 0.1 to 0.9 are published."""
    compute: float | None = None
    """In place of theta: the share of all modules and steps to compute, in [0.5, 1]."""
    loaded: Any = field(default=None, repr=False, compare=False)
    """The `ModuleTable` that was read."""

    def __post_init__(self) -> None:
        ModuleOptions.__post_init__(self)
        check_number("theta", self.theta, least=0, most=1)
        check_number("compute", self.compute, least=0.5, most=1, optional=True)

    def bound_to(self, model: Any) -> "L2C":
        from xfuser_adacorr.model_executor.cache.calibration.module_file import load_table

        return replace(self, loaded=load_table(model, self.router, ROUTER_FILE, "L2C"))

    def make_modules(self) -> "Routed":
        gates = router_gates(self.loaded.tensors["logits"], self.theta, self.compute)
        return Routed(self.loaded, gates)


def router_gates(logits: Tensor, theta: float, compute: float | None = None) -> Tensor:
    """Which modules are computed ``[T, M]``, of logits ``[T, M]``; all in even steps.

    With ``compute`` those of the highest logits, as many as this share of all T * M asks for.
    """
    betas = torch.sigmoid(logits.float())
    gates = betas > theta
    if compute is not None:
        free = betas[1::2].flatten()
        wanted = round(compute * betas.numel()) - (betas.numel() - free.numel())
        chosen = torch.zeros_like(free, dtype=torch.bool)
        chosen[free.argsort(descending=True, stable=True)[: max(wanted, 0)]] = True
        gates[1::2] = chosen.view_as(gates[1::2])
    gates[::2] = True
    return gates


class Routed(ModuleMethod):
    """Follows a table of gates ``[T, M]``."""

    def __init__(self, table: Any, gates: Tensor) -> None:
        self.table, self.rows = table, gates.tolist()

    def bind(self, model, places) -> None:
        self.table.check_modules([place.name for place in places])
        ModuleMethod.bind(self, model, places)

    def begin_run(self, places) -> None:
        self.table.check(places)

    def gates(self, state, step, read) -> list[bool]:
        return self.rows[step.index]
