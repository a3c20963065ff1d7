"""The benchmark on several devices: rank 0 runs it, the others make the same pictures with it.

Rank 0 alone decides what comes next, logs and writes. It tells the others each step before it
takes it, so that no two ranks can be of different opinions about what to do.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmark.errors import BenchmarkError
from benchmark.settings import Settings

LEADER = 0


def rank() -> int:
    """This process's rank under torchrun, else 0."""
    return int(os.environ.get("RANK", LEADER))


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(settings: Settings) -> Iterator[Any]:
    """Within, this process is one of several; gives xfuser's configuration, or None if it is alone.

    Raises:
        BenchmarkError: the degrees do not fit the processes, or xfuser cannot do it here.
    """
    if not settings.degrees:
        yield None
        return
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import Degrees, start, stop

    try:
        engine_config = start(Degrees(**settings.degrees), dtype=getattr(torch, settings.dtype))
    except (ImportError, ValueError, RuntimeError) as error:
        raise BenchmarkError(f"xfuser: {' '.join(str(error).split())}") from error
    yield engine_config
    if rank() == LEADER:
        tell("stop")
    stop()


def parallelised(pipe: Any, engine_config: Any) -> Any:
    """The pipeline split over the processes; raises `BenchmarkError` with xfuser's own reason."""
    if engine_config is None:
        return pipe
    from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import parallelise

    try:
        return parallelise(pipe, engine_config)
    except (ValueError, RuntimeError) as error:
        raise BenchmarkError(f"xfuser: {' '.join(str(error).split())}") from error


def set_scheduler(pipe: Any, scheduler: Any) -> None:
    """Replace a pipeline's scheduler, also where xfuser wraps both."""
    if hasattr(pipe, "_convert_scheduler"):
        pipe.module.scheduler = pipe._convert_scheduler(scheduler)
    else:
        pipe.scheduler = scheduler


def get_scheduler(pipe: Any) -> Any:
    """The diffusers scheduler of a pipeline."""
    return pipe.scheduler.module if hasattr(pipe, "_convert_scheduler") else pipe.scheduler


# -- leading and following -----------------------------------------------------------------------


def _host_group() -> Any:
    from xfuser.core.distributed import get_world_group

    return get_world_group().cpu_group


def tell(*command: Any) -> None:
    """Have the other ranks do the same; nothing in a process that is alone, or follows."""
    if is_joined() and dist.get_rank() == LEADER:
        dist.broadcast_object_list([command], src=LEADER, group=_host_group())


def hear() -> tuple[Any, ...]:
    """What rank 0 tells."""
    box = [None]
    dist.broadcast_object_list(box, src=LEADER, group=_host_group())
    return box[0]


# -- replicas ------------------------------------------------------------------------------------


def replicas() -> int:
    """How many pictures are made at once."""
    if not is_joined():
        return 1
    from xfuser.core.distributed import get_data_parallel_world_size

    return get_data_parallel_world_size()


def own_entry(entries: Sequence[Any]) -> Any | None:
    """The entry of this rank's replica; None if there are fewer entries than replicas."""
    if not is_joined():
        return entries[0]
    from xfuser.core.distributed import get_data_parallel_rank

    replica = get_data_parallel_rank()
    return entries[replica] if replica < len(entries) else None


def gathered(picture: Tensor | None, summary: Any) -> list[tuple[Tensor, Any]]:
    """Rank 0: (picture, summary) of every replica that made one; else an empty list."""
    if not is_joined():
        return [(picture, summary)]
    from xfuser.core.distributed import get_data_parallel_rank

    boxes = [None] * dist.get_world_size() if dist.get_rank() == LEADER else None
    found = (get_data_parallel_rank(), picture, summary)
    dist.gather_object(found, boxes, dst=LEADER, group=_host_group())
    made: dict[int, tuple[Tensor, Any]] = {}
    for replica, its_picture, its_summary in boxes or []:
        # xfuser's pipelines return the picture on the last rank of a replica only
        old_picture, old_summary = made.get(replica, (None, None))
        kept = old_picture if old_picture is not None else its_picture
        made[replica] = (kept, old_summary if old_summary is not None else its_summary)
    return [made[r] for r in sorted(made) if made[r][0] is not None]
