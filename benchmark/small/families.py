"""The small pipelines by name; a family's module is imported when it is asked for."""

from importlib import import_module

from benchmark.small.family import SmallFamily

NAMES = ("flux", "pixart", "dit", "opensora", "sd", "sd3", "wan")


def small_family(name: str) -> SmallFamily:
    """The family `name`; ValueError if it is none of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return import_module(f"benchmark.small.{name}").FAMILY
