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


def parallelise(pipe: Any, engine_config: Any) -> Any:
    """Give a diffusers pipeline to xfuser; returns the pipeline to call.

    FLUX keeps its diffusers pipeline, with a transformer that splits its inputs, unless stages or
    tensors are split; that, and PixArt, is done by xfuser's own pipelines. Replicas stay as they
    are. Raises `ValueError` for a pipeline that is not accepted.
    """
    import xfuser

    name, parallel = type(pipe).__name__, engine_config.parallel_config
    degrees = (parallel.sp_degree, parallel.cfg_degree, parallel.pp_degree, parallel.tp_degree)
    if all(degree == 1 for degree in degrees):
        return pipe
    if name == "FluxPipeline" and degrees[1:] == (1, 1, 1):
        return _split_inside(pipe, engine_config)
    classes = {
        "FluxPipeline": xfuser.xFuserFluxPipeline,
        "PixArtAlphaPipeline": xfuser.xFuserPixArtAlphaPipeline,
        "PixArtSigmaPipeline": xfuser.xFuserPixArtSigmaPipeline,
    }
    if name not in classes:
        raise ValueError(f"pipe must be one of {', '.join(classes)}, got {name}")
    return classes[name](pipe, engine_config)


def _split_inside(pipe: Any, engine_config: Any) -> Any:
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    pipe.transformer = wrap_flux(pipe.transformer, xFuserFlux1Transformer2DWrapper)
    initialize_runtime_state(pipe, engine_config)
    get_runtime_state().set_input_parameters(
        height=pipe.default_sample_size * pipe.vae_scale_factor,
        width=pipe.default_sample_size * pipe.vae_scale_factor,
        batch_size=1,
        max_condition_sequence_length=0,  # read by PipeFusion alone
    )
    return pipe


def wrap_flux(transformer: Any, wrapper_class: type) -> Any:
    """The wrapper with the transformer's own weights, not copied."""
    sizes = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        wrapper = wrapper_class(**sizes)
    wrapper.load_state_dict(transformer.state_dict(), assign=True)
    wrapper.register_to_config(_name_or_path=transformer.config.get("_name_or_path", ""))
    return wrapper.train(transformer.training)
