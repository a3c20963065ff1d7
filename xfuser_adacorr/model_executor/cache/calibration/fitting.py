"""Fitting what Tea and Fast can be calibrated with, from full runs of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
    BlockList,
    ModelFamily,
    TeaPolynomial,
    bind_arguments,
)
from xfuser_adacorr.model_executor.cache.signals import l1_sums, ratio
from xfuser_adacorr.model_executor.cache.sites.blocks import StreamLayout, block_stack
from xfuser_adacorr.model_executor.cache.sites.outputs import sample_of

TEA_DEGREE = 4
RELATIVE_RIDGE = 1e-3


@dataclass(slots=True)
class TeaRecorder:
    """Relative changes from call to call: of the signal, and of the transformer's output."""

    changes: list[tuple[float, float]] = field(default_factory=list)
    _signal: Tensor | None = None
    _previous: tuple[Tensor, Tensor] | None = None

    def begin(self) -> None:
        """A new generation: the next call has no predecessor."""
        self._previous = None

    @contextmanager
    def attached(self, transformer: nn.Module, family: ModelFamily) -> Iterator[None]:
        first_block, _ = block_stack(transformer, family)[0]

        def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
            self._signal = family.modulated_input(block, bind_arguments(block, args, kwargs))

        def after(module: nn.Module, args: tuple, output) -> None:
            sample = sample_of(output)
            if self._previous is not None:
                pairs = zip((self._signal, sample), self._previous, strict=True)
                x, y = (ratio(*torch.stack(l1_sums(*pair)).tolist()) for pair in pairs)
                self.changes.append((x, y))
            self._previous = (self._signal, sample)

        handles = [
            first_block.register_forward_pre_hook(before, with_kwargs=True),
            transformer.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def fit(self) -> TeaPolynomial:
        """Least-squares polynomial of degree 4 over the recorded changes (TeaCache, 3.3)."""
        if len(self.changes) <= TEA_DEGREE:
            raise ValueError(f"a fit needs more than {TEA_DEGREE} changes, got {len(self.changes)}")
        x, y = np.array(self.changes).T
        coefficients = np.polynomial.Polynomial.fit(x, y, TEA_DEGREE).convert().coef[::-1]
        return TeaPolynomial(
            coefficients=tuple(map(float, coefficients)), domain=(float(x.min()), float(x.max()))
        )


class LinearMapFit:
    """Ridge regression of ``y - x`` on ``(x, 1)`` from accumulated normal equations (float64)."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens ``[B, N, D]`` before and after a unit."""
        rows = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float64)
        target = y.detach().reshape(rows.shape).to("cpu", torch.float64) - rows
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        self.gram += rows.T @ rows
        self.cross += rows.T @ target

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return ``weight [D, D]`` and ``bias [D]`` of ``y = x + weight x + bias``."""
        size = len(self.gram)
        ridge = RELATIVE_RIDGE * self.gram.trace() / size * torch.eye(size, dtype=torch.float64)
        ridge[-1, -1] = 0.0
        solution = torch.linalg.solve(self.gram + ridge, self.cross)
        return solution[:-1].T.float(), solution[-1].float()


class FastRecorder:
    """Fits FastCache's linear maps, per block and stream, and of the whole stack."""

    def __init__(self) -> None:
        self.fits: dict[str, LinearMapFit] = {}
        self._stack_input: Tensor | None = None

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        self.fits.setdefault(name, LinearMapFit(x.shape[-1])).add(x, y)

    @contextmanager
    def attached(self, transformer: nn.Module, family: ModelFamily) -> Iterator[None]:
        stack = block_stack(transformer, family)
        stream, layout = family.output_stream, StreamLayout(family.output_stream)

        def hook_for(index: int, block_list: BlockList) -> Callable:
            def after(block: nn.Module, args: tuple, kwargs: dict, output) -> None:
                inputs = layout.read_arguments(block_list, bind_arguments(block, args, kwargs))
                outputs = layout.read_result(block_list, output)
                for name in block_list.streams:
                    self._add(f"blocks.{index}.{name}", inputs[name], outputs[name])
                if index == 0:
                    self._stack_input = inputs[stream]
                if index == len(stack) - 1:
                    self._add(f"stack.{stream}", self._stack_input, outputs[stream])

            return after

        handles = [
            block.register_forward_hook(hook_for(index, block_list), with_kwargs=True)
            for index, (block, block_list) in enumerate(stack)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def maps(self) -> dict[str, Tensor]:
        """The fitted maps by the names that `load_fast_maps` knows, in float16."""
        result = {}
        for name, fit in self.fits.items():
            weight, bias = fit.solve()
            result[f"{name}.weight"], result[f"{name}.bias"] = weight.half(), bias.half()
        return result
