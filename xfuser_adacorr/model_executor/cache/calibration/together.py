"""Ranks that calibrate one plan together: replicas divide the prompts, others share each sample.

A fit is made of sums over each sample. Where ranks hold parts of the latents these are added up,
where they have whole latents those of the first one count, and replicas put theirs side by side:
so that every rank has the sums of all samples, fits the same numbers, and takes the same schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_gather_object, get_rank, get_world_size

from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.xfuser_adapters.scope import (
    data_parallel_group,
    find_scope,
    find_stage,
)


@dataclass(frozen=True, slots=True)
class Together:
    """The ranks of one calibration."""

    scope: DecisionScope
    """Those that share a sample."""
    replicas: ProcessGroup | None = None
    """One rank of each replica, which have prompts of their own."""

    # -- prompts ---------------------------------------------------------------------------------

    def share(self, calls: Sequence[Any]) -> Sequence[Any]:
        """Those of all calls that this replica makes."""
        return calls[self._begin(calls, 0) : self._begin(calls, 1)]

    def first_of(self, calls: Sequence[Any]) -> int:
        """The place of its first one among all."""
        return self._begin(calls, 0)

    def _begin(self, calls: Sequence[Any], after: int) -> int:
        if self.replicas is None:
            return after * len(calls)
        rank, count = get_rank(self.replicas), get_world_size(self.replicas)
        return (rank + after) * len(calls) // count

    def check_calls(self, pipe: Any, calls: Sequence[Any], batch_size: int) -> None:
        """`ValueError` for calls that these ranks cannot divide, or cannot make by turns."""
        count = 1 if self.replicas is None else get_world_size(self.replicas)
        if count > 1 and batch_size > 1 and "engine_config" in vars(pipe):
            raise ValueError(
                f"batch_size must be 1 on {type(pipe).__name__} with several replicas, over which "
                f"it divides lists of prompts itself; got {batch_size}"
            )
        if len(calls) < count:
            raise ValueError(
                f"prompts: {len(calls)} calls cannot be divided over {count} replicas; give more "
                "prompts, or a smaller batch_size"
            )
        if self.scope.is_parallel and len({len(each["seeds"]) for each in calls}) > 1:
            raise ValueError(
                f"batch_size: {batch_size} must divide the number of prompts where ranks share a "
                "sample, since their engine is set to one size of batch"
            )

    # -- what all ranks know ---------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows bars."""
        groups = (self.scope.group, self.replicas)
        return all(group is None or get_rank(group) == 0 for group in groups)

    def samples(self, sums: Tensor, over_parts: Callable[..., Tensor] = torch.sum) -> Tensor:
        """``[K, ...]`` of all samples out of those of this rank's latents, in the prompts' order.

        ``over_parts(stacked, dim=0)`` makes a whole of ranks that hold parts of the latents.
        """
        parts = gathered(sums, self.scope.group)
        split = self.scope.latents_are_split and len(parts) > 1
        whole = over_parts(torch.stack(parts), dim=0) if split else parts[0]
        return torch.cat(gathered(whole, self.replicas))

    def of_calls(self, found: Sequence[Any]) -> list[Any]:
        """What is known of all calls, in their order; None is what a rank does not know."""
        known = zip(*gathered(list(found), self.scope.group), strict=True)
        whole = [next((x for x in each if x is not None), None) for each in known]
        return [x for part in gathered(whole, self.replicas) for x in part]

    def heard(self, x: Any) -> list[Any]:
        """What every rank says, the first one's first."""
        said = gathered(gathered(x, self.scope.group), self.replicas)
        return [each for part in said for each in part]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What one rank raises inside is raised on all of them."""
        raised: Exception | None = None
        try:
            yield
        except Exception as error:
            raised = error
        errors = [each for each in self.heard(raised) if each is not None]
        if errors:
            raise raised or errors[0]

    def by_first(self, act: Callable[[], Any]) -> Any:
        """The result of what the first rank alone does; its error is raised on all of them."""
        result = None
        with self.alike():
            if self.is_first:
                result = act()
        return self.heard(result)[0]


ALONE = Together(DecisionScope())
"""This process."""


def gathered(x: Any, group: ProcessGroup | None) -> list[Any]:
    """``x`` of every rank of a group, in the order of its ranks."""
    if group is None:
        return [x]
    found: list[Any] = [None] * get_world_size(group)
    all_gather_object(found, x, group=group)
    return found


def together_with(model: nn.Module, replicas: ProcessGroup | None) -> Together:
    """The ranks that calibrate with this one: those of xfuser's state, or the ``replicas`` given.

    Raises `ValueError` under PipeFusion.
    """
    if replicas is not None and not isinstance(replicas, ProcessGroup):
        raise TypeError(
            f"replicas must be a torch.distributed ProcessGroup or None, got {replicas!r}"
        )
    if find_stage(model) is not None:
        raise ValueError(
            "calibration: not under PipeFusion, whose patches no plan can be followed in; use "
            "replicas, Ulysses or CFG parallelism"
        )
    return Together(find_scope(model, at_sampler=True), replicas or data_parallel_group())
