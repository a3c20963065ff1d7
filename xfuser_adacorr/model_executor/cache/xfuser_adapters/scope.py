"""Which ranks decide together, read from xfuser's parallel state.

Transformers that subclass a diffusers model split inside their forward: latents and output are
whole on every rank. Legacy wrappers (those that hold ``.module``) are called with a part: rows for
sequence parallelism, a branch for CFG parallelism, a stage's tokens for PipeFusion.
"""

import sys
from typing import Any

import torch
from torch import nn

from xfuser_adacorr.model_executor.cache.methods.options import Literal, Method, compute_target
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.models.opensora.sequence_parallel import SequenceParallel

from .pipefusion import PIPEFUSION_METHODS, PipelineStage

LEGACY_WRAPPER = "xFuserTransformerBaseWrapper"


def _class_names(x: Any) -> set[str]:
    return {cls.__name__ for cls in type(x).__mro__}


def _parallel_state() -> Any:
    """xfuser's parallel state if this process has joined it, else None."""
    state = sys.modules.get("xfuser.core.distributed.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def data_parallel_group() -> Any:
    """One rank of each of xfuser's data-parallel replicas; None where there is one, or none."""
    state = _parallel_state()
    replicas = state.get_dp_group() if state is not None else None
    return replicas.cpu_group if replicas is not None and replicas.world_size > 1 else None


def is_xfuser_transformer(transformer: nn.Module) -> bool:
    return any(cls.__module__.startswith("xfuser.") for cls in type(transformer).__mro__)


def find_scope(
    transformer: nn.Module, *, at_sampler: bool = False, check_ranks: bool = False
) -> DecisionScope:
    """The ranks that share this transformer's samples; none for a model that is not split.

    ``at_sampler``: the latents are those that the scheduler steps, where CFG parallelism has put
    its branches together. Every rank has to ask, since a group may have to be made.
    """
    own = getattr(transformer, "sequence_parallel", None)
    if isinstance(own, SequenceParallel):
        return DecisionScope(own.group, check_ranks=check_ranks)
    state = _parallel_state()
    if state is None or not is_xfuser_transformer(transformer):
        return DecisionScope()
    legacy = LEGACY_WRAPPER in _class_names(transformer)
    rows = state.get_sp_group().world_size > 1
    branches = state.get_cfg_group().world_size > 1 and not at_sampler
    return DecisionScope(
        _sample_group(state),
        latents_are_split=legacy and (rows or branches),
        check_ranks=check_ranks,
    )


def _sample_group(state: Any) -> Any:
    """Ranks of one replica and one pipeline stage; None if that is this rank alone."""
    if state.get_pp_group().world_size == 1:
        replica = state.get_model_replica_group()
        return replica.device_group if replica.world_size > 1 else None
    dimensions = (state.get_tp_group(), state.get_sp_group(), state.get_cfg_group())
    split = [group for group in dimensions if group.world_size > 1]
    if len(split) < 2:
        return split[0].device_group if split else None
    return _stage_group(state, *(group.world_size for group in dimensions))


def _stage_group(state: Any, tp: int, sp: int, cfg: int) -> Any:
    """A new group of this stage's ranks; xfuser has none that leaves out the pipeline alone."""
    from xfuser.core.distributed.utils import RankGenerator

    pp, dp = state.get_pp_group().world_size, state.get_dp_group().world_size
    ranks = RankGenerator(tp, sp, pp, cfg, dp, 1, "tp-sp-pp-cfg-dp").get_ranks("tp-sp-cfg")
    return torch.distributed.new_subgroups_by_enumeration(ranks)[0]


def find_stage(transformer: nn.Module) -> PipelineStage | None:
    """This rank's place in PipeFusion; None if the transformer is not split into stages."""
    state = _parallel_state()
    if state is None or LEGACY_WRAPPER not in _class_names(transformer):
        return None
    pipeline = state.get_pp_group()
    return PipelineStage(pipeline) if pipeline.world_size > 1 else None


def check_method(method: Method, scope: DecisionScope, stage: PipelineStage | None) -> None:
    """Raise `ValueError` for what cannot be decided alike on all ranks."""
    if scope.is_parallel and getattr(method, "static_tokens", False):
        raise ValueError(
            "static_tokens must be False where ranks share a sample: they would keep different "
            "numbers of tokens"
        )
    correction = getattr(method, "correction", None)
    if (scope.is_parallel or stage is not None) and isinstance(correction, Literal):
        raise ValueError(
            "adacorr_mode must be 'adaptive' where ranks share a sample: the literal blend weighs "
            "each rank's own tokens"
        )
    if stage is None:
        return
    if getattr(method, "learn", None) is not None:
        raise ValueError("learn must be None under PipeFusion: no plan can be followed in patches")
    if method.label not in PIPEFUSION_METHODS:
        raise ValueError(
            f"under PipeFusion the cache must be one of {', '.join(PIPEFUSION_METHODS)}, with or "
            f"without AdaCorrection, since the first stage decides; got {method.name}"
        )
    options = correction or method
    if hasattr(options, "target_compute") and compute_target(options) is not None:
        raise ValueError(
            "target_compute must be None under PipeFusion: each patch has a history of its own, "
            "and none of them knows the whole run's budget; give a tolerance"
        )
