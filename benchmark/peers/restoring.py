"""Gives a pipeline back exactly as it was, whatever a peer leaves behind."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from benchmark.run.flops import denoisers

_DICTIONARIES = (dict, OrderedDict)


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """Afterwards the pipeline, its scheduler and all modules of its denoisers have the attributes,
    submodules and hooks that they had before."""
    modules = [module for denoiser in denoisers(pipe) for module in denoiser.modules()]
    objects = [pipe, pipe.scheduler, *modules]
    before = [_contents(x) for x in objects]
    try:
        yield
    finally:
        for x, (attributes, inner) in zip(objects, before, strict=True):
            x.__dict__.clear()
            x.__dict__.update(attributes)
            for name, content in inner.items():
                x.__dict__[name].clear()
                x.__dict__[name].update(content)


def _contents(x: Any) -> tuple[dict[str, Any], dict[str, dict]]:
    """Attributes, and copies of those that are dictionaries (submodules, hooks, buffers)."""
    attributes = dict(x.__dict__)
    inner = {name: dict(v) for name, v in attributes.items() if type(v) in _DICTIONARIES}
    return attributes, inner


def before_every_picture(pipe: Any, reset: Callable[[], None]) -> None:
    """Have ``reset`` called when the pipeline begins a picture: it asks for timesteps first."""
    scheduler = pipe.scheduler
    set_timesteps = scheduler.set_timesteps

    @wraps(set_timesteps)  # pipelines look at its signature
    def begin(*args: Any, **kwargs: Any) -> Any:
        reset()
        return set_timesteps(*args, **kwargs)

    scheduler.set_timesteps = begin
