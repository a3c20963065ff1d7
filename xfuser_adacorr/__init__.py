"""AdaCorrection and the cache methods it corrects, for diffusers and xfuser transformers.

Importing this is light: diffusers is imported with the first verb, xfuser only by multi-GPU runs.
"""

from importlib import import_module
from typing import Any

from .config import METHODS, PLANNED_METHODS, CacheConfig, load_config, load_family_config

__version__ = "0.1.0"

_AVERAGING = "xfuser_adacorr.model_executor.cache.averaging"
_API = "xfuser_adacorr.model_executor.cache.api"
_CONTEXT = "xfuser_adacorr.model_executor.cache.context"
_DISTRIBUTED = "xfuser_adacorr.core.distributed"
_REGISTRY = "xfuser_adacorr.model_executor.cache.diffusers_adapters.registry"
_LAZY = {
    "apply_cache_on_transformer": _API,
    "cache_summary": _API,
    "disable_cache": _API,
    "enable_cache": _API,
    "is_cache_enabled": _API,
    "reset_cache": _API,
    "DecisionScope": _DISTRIBUTED,
    "RankMismatchError": _DISTRIBUTED,
    "CacheSummary": _CONTEXT,
    "CallRecord": _CONTEXT,
    "Trace": _CONTEXT,
    "BlockList": _REGISTRY,
    "ModelFamily": _REGISTRY,
    "TeaPolynomial": _REGISTRY,
    "register_family": _REGISTRY,
    "schedule_from_traces": _AVERAGING,
}

__all__ = [
    "METHODS",
    "PLANNED_METHODS",
    "CacheConfig",
    "load_config",
    "load_family_config",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
