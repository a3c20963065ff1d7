"""Taking over calls without touching weights, hooks, or attributes.

The object's class is replaced by a subclass of the same name whose ``__call__`` (of a module) or
``step`` (of a scheduler) goes through a handler. It stays outside forward hooks, offloading, LoRA
and compiled graphs of the module, in whatever order those are applied; giving the class back
restores the object exactly.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

from torch import nn

Handler = Callable[..., Any]
_HANDLER = "_cache_call_handler"


class InterceptedCall:
    """Mixin whose ``__call__`` hands the original call and its arguments to the handler."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_HANDLER](super().__call__, *args, **kwargs)


class InterceptedStep:
    """Mixin of a scheduler whose ``step`` is taken over: whatever is made from it is plain."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._intercepts(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return object.__new__, (type(self)._intercepts,), own_attributes(self)


def _subclass(cls: type, mixin: type, **members: Any) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), {**names, "_intercepts": cls, **members})


@cache
def _intercepted_class(cls: type, mixin: type) -> type:
    return _subclass(cls, mixin)


@cache
def _stepping_class(cls: type) -> type:
    @wraps(cls.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_HANDLER](partial(cls.step, self), *args, **kwargs)

    return _subclass(cls, InterceptedStep, step=step)


def intercept(module: nn.Module, handler: Handler, mixin: type = InterceptedCall) -> None:
    """Route ``module(...)`` through ``handler(original_call, *args, **kwargs)``."""
    module.__dict__[_HANDLER] = handler
    _set_class(module, _intercepted_class(type(module), mixin))


def intercept_step(scheduler: Any, handler: Handler) -> None:
    """Route ``scheduler.step(...)`` through ``handler(original_step, *args, **kwargs)``."""
    scheduler.__dict__[_HANDLER] = handler
    _set_class(scheduler, _stepping_class(type(scheduler)))


def _set_class(x: Any, cls: type) -> None:
    """Past an own ``__setattr__``: xfuser's wrappers hand attributes on to what they wrap."""
    object.__setattr__(x, "__class__", cls)


def release(intercepted: Any) -> None:
    """Undo `intercept` or `intercept_step`."""
    _set_class(intercepted, type(intercepted)._intercepts)
    del intercepted.__dict__[_HANDLER]


def handler_of(module: Any) -> Handler | None:
    """The handler of an intercepted object, else None."""
    return getattr(module, "__dict__", {}).get(_HANDLER)


def own_attributes(x: Any) -> dict[str, Any]:
    """Attributes of an object, without what taking it over added."""
    return {name: value for name, value in vars(x).items() if name != _HANDLER}
