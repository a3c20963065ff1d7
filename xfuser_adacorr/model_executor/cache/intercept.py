"""Taking over a module's calls without touching its weights, hooks, or attributes.

The module's class is replaced by a subclass of the same name whose ``__call__`` goes through a
handler. It stays outside forward hooks, offloading, LoRA and compiled graphs of the module, in
whatever order those are applied; giving the class back restores the module exactly.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

Handler = Callable[..., Any]
_HANDLER = "_cache_call_handler"


class InterceptedCall:
    """Mixin whose ``__call__`` hands the original call and its arguments to the handler."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_HANDLER](super().__call__, *args, **kwargs)


@cache
def _intercepted_class(cls: type, mixin: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**names, "_intercepts": cls})


def intercept(module: nn.Module, handler: Handler, mixin: type = InterceptedCall) -> None:
    """Route ``module(...)`` through ``handler(original_call, *args, **kwargs)``."""
    module.__dict__[_HANDLER] = handler
    module.__class__ = _intercepted_class(type(module), mixin)


def release(module: nn.Module) -> None:
    """Undo `intercept`."""
    module.__class__ = type(module)._intercepts
    del module.__dict__[_HANDLER]


def handler_of(module: Any) -> Handler | None:
    """The handler of an intercepted module, else None."""
    return getattr(module, "__dict__", {}).get(_HANDLER)
