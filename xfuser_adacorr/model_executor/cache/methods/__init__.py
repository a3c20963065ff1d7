"""Base methods by name; a new one is a file beside these and a line here."""

from torch import nn

from xfuser_adacorr.config import CacheConfig
from xfuser_adacorr.model_executor.cache.context import Trace
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import ModelFamily

from .ada import Ada
from .auto import Auto
from .base import BaseMethod
from .fast import Fast
from .fb import Fb
from .replay import Replay
from .schedule import Schedule
from .tea import Tea

REPLAY = "Replay"

METHOD_CLASSES: dict[str, type[BaseMethod]] = {
    "Fb": Fb,
    "Tea": Tea,
    "Fast": Fast,
    "Ada": Ada,
    "Auto": Auto,
    "Schedule": Schedule,
}


def make_method(
    config: CacheConfig, family: ModelFamily, transformer: nn.Module, replayed: Trace | None
) -> BaseMethod:
    """The method that ``config`` names; with the decisions of ``replayed`` if there is a trace."""
    method_class = METHOD_CLASSES[config.use_cache]
    method = method_class(config, family, transformer, signal_only=config.enable_adacorrection)
    return method if replayed is None else Replay(method, replayed)
