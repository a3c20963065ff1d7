"""Starting xfuser's parallel engine in a process that torchrun (or a test) started."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .platform import has_accelerator, load_xfuser


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Over how many devices each dimension is split; names and meaning are xfuser's.

    Their product, with 2 for ``use_cfg_parallel``, is the number of processes.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    pipefusion_parallel_degree: int = 1
    tensor_parallel_degree: int = 1
    data_parallel_degree: int = 1
    use_cfg_parallel: bool = False

    @property
    def world_size(self) -> int:
        sizes = [value for name, value in asdict(self).items() if name != "use_cfg_parallel"]
        product = 2 if self.use_cfg_parallel else 1
        for size in sizes:
            product *= size
        return product


def start(degrees: Degrees, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Join the processes and return xfuser's ``EngineConfig``; again for other degrees.

    ``dtype`` is the model's (PipeFusion's buffers have it); ``options`` are fields of
    ``xfuser.xFuserArgs`` (``warmup_steps``, ``num_pipeline_patch``). Raises `ValueError` if the
    degrees do not fit the number of processes, and xfuser's own `RuntimeError` for what it cannot
    do on this machine.
    """
    xfuser = load_xfuser()
    from xfuser.core.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from xfuser.core.distributed.parallel_state import destroy_model_parallel

    _repair()
    if not has_accelerator():
        options.setdefault("attention_backend", "SDPA")
    init_distributed_environment()
    world_size = torch.distributed.get_world_size()
    if degrees.world_size != world_size:
        raise ValueError(
            f"the product of the parallel degrees must be the number of processes {world_size}, "
            f"got {degrees.world_size} from {asdict(degrees)}"
        )
    engine_config, _ = xfuser.xFuserArgs(**asdict(degrees), **options).create_config()
    engine_config.runtime_config.dtype = dtype
    parallel = engine_config.parallel_config
    if model_parallel_is_initialized():
        destroy_model_parallel()
    initialize_model_parallel(
        data_parallel_degree=parallel.dp_degree,
        classifier_free_guidance_degree=parallel.cfg_degree,
        sequence_parallel_degree=parallel.sp_degree,
        ulysses_degree=parallel.ulysses_degree,
        ring_degree=parallel.ring_degree,
        tensor_parallel_degree=parallel.tp_degree,
        pipeline_parallel_degree=parallel.pp_degree,
    )
    return engine_config


def _repair() -> None:
    """Give 0.7.0's FLUX wrapper the name by which it calls its own padding (uneven tokens)."""
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper as Wrapper,
    )

    if not hasattr(Wrapper, "_pad_to_sp_divisible"):
        Wrapper._pad_to_sp_divisible = Wrapper.pad_to_sp_divisible


def stop() -> None:
    """Leave the processes' groups."""
    from xfuser.core.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()
