"""Caches of diffusers on a model: two caches on one model would answer each other's calls."""

from collections.abc import Iterable

from torch import nn

HOOKS = (
    "faster_cache",
    "fbc_",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)
"""Beginnings of the names under which diffusers' caches register their hooks."""


def other_cache_on(model: nn.Module) -> str | None:
    """The cache of diffusers that acts on a model: its config's class, or its hook; None if none.

    ``apply_first_block_cache`` and the like leave hooks alone, ``model.enable_cache`` a config too.
    """
    config = vars(model).get("_cache_config")
    if config is not None:
        return type(config).__name__
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in getattr(registry, "hooks", ()):
            if name.startswith(HOOKS):
                return name
    return None


def check_alone(models: Iterable[nn.Module]) -> None:
    """Raise `ValueError` if a cache of diffusers was put on one of the models since."""
    for model in models:
        name = other_cache_on(model)
        if name is not None:
            raise ValueError(
                f"a cache of diffusers ({name}) is on the {type(model).__name__}, and another one "
                "is enabled: disable one of them"
            )
