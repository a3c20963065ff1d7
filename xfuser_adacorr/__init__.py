"""AdaCorrection and the cache methods it corrects, for diffusers and xfuser pipelines.

Importing this is light: diffusers is imported with the first verb, xfuser only by multi-GPU runs.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_CACHE = "xfuser_adacorr.model_executor.cache"
_HOMES = {
    "xfuser_adacorr.config": (
        "METHODS",
        "CacheConfig",
        "load_config",
        "load_family_config",
        "method_named",
    ),
    f"{_CACHE}.api": (
        "apply_cache_on_transformer",
        "cache_summary",
        "disable_cache",
        "enable_cache",
        "is_cache_enabled",
        "reset_cache",
    ),
    f"{_CACHE}.calibration.calibrate": ("calibrate",),
    f"{_CACHE}.calibration.learned": ("calibrate_learned",),
    f"{_CACHE}.calibration.unseen": ("measure_plan",),
    f"{_CACHE}.methods.ada": ("Ada",),
    f"{_CACHE}.methods.auto": ("Auto",),
    f"{_CACHE}.methods.eoc": ("EOC",),
    f"{_CACHE}.methods.fast": ("Fast",),
    f"{_CACHE}.methods.fb": ("Fb",),
    f"{_CACHE}.methods.fora": ("FORA",),
    f"{_CACHE}.methods.goc": ("GOC",),
    f"{_CACHE}.methods.l2c": ("L2C",),
    f"{_CACHE}.methods.lazy": ("Lazy",),
    f"{_CACHE}.methods.learned": ("Learned", "save_plans"),
    f"{_CACHE}.methods.options": ("AdaCorrection", "Literal", "Method"),
    f"{_CACHE}.methods.replay": ("Replay",),
    f"{_CACHE}.methods.schedule": ("Schedule",),
    f"{_CACHE}.methods.tea": ("Tea",),
    f"{_CACHE}.methods.toca": ("ToCa",),
    f"{_CACHE}.methods.tome": ("ToMe",),
    f"{_CACHE}.ranks": ("DecisionScope", "RankMismatchError"),
    f"{_CACHE}.trace": ("CacheSummary", "CallRecord", "Trace"),
    f"{_CACHE}.diffusers_adapters.family": (
        "BlockList",
        "ModelFamily",
        "TeaPolynomial",
        "register_family",
    ),
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
