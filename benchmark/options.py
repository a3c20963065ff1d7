"""Options as fields of a dataclass: their help and checks, and the parser made of them."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NoReturn

from benchmark.errors import BenchmarkError


class Parser(argparse.ArgumentParser):
    """Raises `BenchmarkError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(message)


@dataclass(frozen=True, slots=True)
class Check:
    """What an option's value, or each of its values, has to be."""

    accepts: Callable[[Any], bool]
    wanted: str


def at_least(least: float) -> Check:
    return Check(lambda value: least <= value < float("inf"), f"at least {least}")


def above(least: float) -> Check:
    return Check(lambda value: least < value < float("inf"), f"above {least}")


SHARE = Check(lambda value: 0 < value <= 1, "a share of at most 1, above 0")


def one_of(names: Collection[str]) -> Check:
    return Check(lambda value: value in names, f"one of {', '.join(names)}")


def option(
    explanation: str,
    default: Any = None,
    *,
    read: Callable[[str], Any] = str,
    check: Check | None = None,
    many: bool = False,
    shown: str | None = None,
    flags: Mapping[str, Any] | None = None,
    group: str = "",
) -> Any:
    """A field of a dataclass that is an option of the command line too.

    Args:
        explanation: for the help.
        default: a flag without an argument if it is False.
        read: text -> value.
        check: of the value, where it is not None.
        many: whether it is a tuple of values.
        shown: what the help says of the default, where it does not say it itself.
        flags: names on the command line -> the value that each of them stands for.
        group: heading in the help.
    """
    metadata = dict(
        explanation=explanation,
        read=read,
        check=check,
        many=many,
        shown=shown,
        flags=flags,
        group=group,
    )
    return field(default=default, metadata=metadata)


def whole(explanation: str, default: int | None = None, least: int = 1, **more: Any) -> Any:
    """An `option` that is a whole number."""
    return option(explanation, default, read=int, check=at_least(least), **more)


def number(explanation: str, default: float | None, check: Check, **more: Any) -> Any:
    """An `option` that is a number."""
    return option(explanation, default, read=float, check=check, **more)


def check_options(given: Any) -> None:
    """Check all options of a dataclass; raises `BenchmarkError` that names the first wrong one."""
    for each in fields(given):
        value, check = getattr(given, each.name), each.metadata.get("check")
        if value is None or check is None:
            continue
        for one in value if each.metadata["many"] else (value,):
            if not check.accepts(one):
                raise BenchmarkError(f"--{each.name} must be {check.wanted}, got {one!r}")


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    names: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add the options of a dataclass; what is not given leaves no trace in the namespace.

    Args:
        names: only these (all).
        defaults: other defaults, for the help.
    """
    groups: dict[str, Any] = {}
    for each in fields(options):
        if "explanation" not in each.metadata or (names is not None and each.name not in names):
            continue
        heading = each.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading) if heading else parser
        own = (defaults or {}).get(each.name)
        shown = _text(own) or each.metadata["shown"] or _text(each.default)
        _add(groups[heading], each, shown)


def _add(group: Any, each: Field, shown: str) -> None:
    meta = each.metadata
    common: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
    if meta["flags"]:
        exclusive = group.add_mutually_exclusive_group()
        for flag, value in meta["flags"].items():
            explanation = f"{meta['explanation']}: {value}"
            exclusive.add_argument(
                f"--{flag}", action="store_const", const=value, help=explanation, **common
            )
        return
    if each.default is False:
        group.add_argument(
            f"--{each.name}", action="store_true", help=meta["explanation"], **common
        )
        return
    explanation = meta["explanation"] + (f" ({shown})" if shown else "")
    more = {"nargs": "+"} if meta["many"] else {}
    group.add_argument(
        f"--{each.name}", type=meta["read"], metavar="X", help=explanation, **more, **common
    )


def _text(default: Any) -> str:
    if default is None or default is MISSING:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def taken(given: Mapping[str, Any], options: type) -> dict[str, Any]:
    """Of parsed arguments those that are options of the dataclass; lists become tuples."""
    return {
        each.name: tuple(given[each.name]) if each.metadata["many"] else given[each.name]
        for each in fields(options)
        if each.name in given
    }
