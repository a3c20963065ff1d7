"""Taking over calls without touching weights, hooks, or attributes.

The object's class is replaced by a subclass of the same name whose ``__call__`` (of a module) or
``step`` (of a scheduler) goes through a handler. It stays outside forward hooks, offloading, LoRA
and compiled graphs of the module, in whatever order those are applied; giving the class back
restores the object exactly. Copies and pickles of a module are plain. A copy of a scheduler is
taken over too, since pipelines step copies (LTX-2's audio); a pickle of it is plain.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn

Handler = Callable[..., Any]
HANDLER, _OWNER = "_cache_call_handler", "_cache_owner"
"""Attributes that taking over adds."""


class Context(threading.local):
    """The ``cache_context`` that a thread is in; every owner of models has one."""

    name: str | None = None


class Intercepted:
    """Mixin whose pickles are plain."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _plain, (type(self)._intercepts,), own_attributes(self)


class InterceptedCall(Intercepted):
    """Mixin whose ``__call__`` hands the original call and its arguments to the handler."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[HANDLER](super().__call__, *args, **kwargs)


class InterceptedModel(Intercepted):
    """What an enabled model's class adds: it follows the pipeline's cache contexts."""

    @torch.compiler.disable  # of a model compiled later, the cache is not a part of the graph
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[HANDLER](super().__call__, *args, **kwargs)

    @property
    def _cache_config(self) -> Any:
        return self.__dict__[_OWNER].method

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any):
        """Names the calls made inside, as ``CacheMixin.cache_context`` does."""
        context = self.__dict__[_OWNER].context
        outer, context.name = context.name, name
        try:
            yield
        finally:
            context.name = outer

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        self.__dict__[_OWNER].reset()

    def disable_cache(self) -> None:
        self.__dict__[_OWNER].uninstall()


class InterceptedStep(Intercepted):
    """Mixin of a scheduler whose ``step`` is taken over."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._intercepts(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = _plain(type(self)._intercepts)
        memo[id(self)] = plain
        plain.__dict__.update(copy.deepcopy(own_attributes(self), memo))
        return _taken_over_alike(plain, self)

    def __copy__(self) -> Any:
        plain = _plain(type(self)._intercepts)
        plain.__dict__.update(own_attributes(self))
        return _taken_over_alike(plain, self)


def _taken_over_alike(copied: Any, scheduler: Any) -> Any:
    """The copy of a scheduler, taken over by the same handler, which is told of it."""
    handler = scheduler.__dict__[HANDLER]
    intercept_step(copied, handler)
    told = getattr(getattr(handler, "__self__", None), "copied", None)
    if told is not None:
        told(copied)
    return copied


def _plain(cls: type) -> Any:
    return object.__new__(cls)


def _subclass(cls: type, mixin: type, **members: Any) -> type:
    """A subclass that equals ``cls``: pipelines compare ``type(scheduler)`` with classes."""

    class Alike(type(cls)):
        def __eq__(self, other: object) -> bool:
            return other is self or other is cls

        def __hash__(self) -> int:
            return hash(cls)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return Alike(cls.__name__, (mixin, cls), {**names, "_intercepts": cls, **members})


@cache
def _intercepted_class(cls: type, mixin: type) -> type:
    return _subclass(cls, mixin)


@cache
def _stepping_class(cls: type) -> type:
    @wraps(cls.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[HANDLER](self, partial(cls.step, self), *args, **kwargs)

    return _subclass(cls, InterceptedStep, step=step)


def intercept(
    module: nn.Module, handler: Handler, owner: Any = None, mixin: type = InterceptedCall
) -> None:
    """Route ``module(...)`` through ``handler(original_call, *args, **kwargs)``."""
    module.__dict__[HANDLER], module.__dict__[_OWNER] = handler, owner
    _set_class(module, _intercepted_class(type(module), mixin))


def intercept_step(scheduler: Any, handler: Handler) -> None:
    """Route ``scheduler.step(...)`` through ``handler(scheduler, original_step, ...)``, in place
    of an earlier handler if there is one."""
    taken = is_intercepted(scheduler)
    scheduler.__dict__[HANDLER] = handler
    if not taken:
        _set_class(scheduler, _stepping_class(type(scheduler)))


def _set_class(x: Any, cls: type) -> None:
    """Past an own ``__setattr__``: xfuser's wrappers hand attributes on to what they wrap."""
    object.__setattr__(x, "__class__", cls)


def release(intercepted: Any) -> None:
    """Undo `intercept` or `intercept_step`."""
    _set_class(intercepted, type(intercepted)._intercepts)
    for name in (HANDLER, _OWNER):
        intercepted.__dict__.pop(name, None)


def is_intercepted(x: Any) -> bool:
    return HANDLER in getattr(x, "__dict__", {})


def handler_of(x: Any) -> Handler | None:
    """What calls are routed through, None where nothing took them over."""
    return getattr(x, "__dict__", {}).get(HANDLER)


def owner_of(module: Any) -> Any:
    """What took a module over, None if nothing did."""
    return getattr(module, "__dict__", {}).get(_OWNER)


def own_attributes(x: Any) -> dict[str, Any]:
    """Attributes of an object, without what taking it over added."""
    return {name: value for name, value in vars(x).items() if name not in (HANDLER, _OWNER)}
