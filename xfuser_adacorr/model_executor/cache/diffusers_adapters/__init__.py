"""Descriptions of model families, and the entry point that xfuser's callers know."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "apply_cache_on_transformer":
        from xfuser_adacorr.model_executor.cache.api import apply_cache_on_transformer

        return apply_cache_on_transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
