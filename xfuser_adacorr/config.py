"""Names, flat keywords and YAML files, mapped onto the methods' option classes."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .model_executor.cache.methods.ada import Ada
from .model_executor.cache.methods.auto import Auto
from .model_executor.cache.methods.eoc import EOC
from .model_executor.cache.methods.fast import Fast
from .model_executor.cache.methods.fb import Fb
from .model_executor.cache.methods.fora import FORA
from .model_executor.cache.methods.goc import GOC
from .model_executor.cache.methods.l2c import L2C
from .model_executor.cache.methods.lazy import Lazy
from .model_executor.cache.methods.learned import Learned
from .model_executor.cache.methods.options import (
    CORRECTED_SUFFIX,
    AdaCorrection,
    Literal,
    Method,
    check_choice,
    check_flag,
)
from .model_executor.cache.methods.replay import Replay
from .model_executor.cache.methods.schedule import Schedule
from .model_executor.cache.methods.tea import Tea
from .model_executor.cache.methods.toca import ToCa
from .model_executor.cache.methods.tome import ToMe

MODULE_METHODS: tuple[type[Method], ...] = (FORA, L2C, Lazy, ToCa, ToMe, EOC, GOC)
"""Methods on attention and feed-forward modules inside the blocks."""
METHOD_CLASSES: dict[str, type[Method]] = {
    each.label: each
    for each in (Fb, Tea, Fast, Ada, Auto, Schedule, Learned, Replay, *MODULE_METHODS)
}
METHODS = ("Fb", "Tea", "Fast", "Ada", "Auto")
"""Methods that need nothing but a model; the others are told which steps to compute."""

ADACORR_MODES = ("adaptive", "literal")
FLAT_NAMES = {
    "threshold": "rel_l1_thresh",
    "warmup": "warmup_steps",
    "interpolate": "schedule_interpolation",
}
"""Options whose flat keyword is another: field -> keyword."""
CORRECTION_NAMES = {
    "gamma": "adacorr_gamma",
    "lambda_": "adacorr_lambda",
    "tolerance": "adacorr_tolerance",
    "target_compute": "target_compute",
    "target_speedup": "target_speedup",
}
STAND_INS = {"reuse": "residual", "last": "last", "forecast": "line"}
"""Schedule's ``stand_in`` -> `Schedule.forecast`."""
OTHERS = ("use_cache", "enable_adacorrection", "adacorr_mode")
NOT_FLAT = ("correction", "loaded", "traced", "bound", "every", "steps", "stored", "forecast")
SCHEDULE_NAMES = ("schedule", "stand_in", "calibration")


def flat_names(method: type[Method]) -> dict[str, str]:
    """Flat keyword -> field of a method's own options, without those of its correction."""
    own = {f.name for f in fields(method)} - set(NOT_FLAT)
    names = CORRECTION_NAMES if issubclass(method, Auto) else {}
    return {names.get(name, FLAT_NAMES.get(name, name)): name for name in sorted(own)}


def _takers() -> dict[str, list[str]]:
    """Flat keyword -> the display names of the methods that have it."""
    takers: dict[str, list[str]] = {}
    for label, method in METHOD_CLASSES.items():
        names = [*flat_names(method), *(SCHEDULE_NAMES if method is Schedule else ())]
        for name in names:
            takers.setdefault(name, []).append(label)
        if "correction" in {f.name for f in fields(method)} and method is not Schedule:
            modes = () if method in MODULE_METHODS else ("adacorr_mode",)
            for name in (*CORRECTION_NAMES.values(), *modes):
                takers.setdefault(name, []).append(label + CORRECTED_SUFFIX)
    return takers


def method_named(name: str, **flat: Any) -> Method:
    """Options from a display name such as ``Fast`` or ``Fast+AdaCorrection`` and flat keywords.

    Raises `ValueError` for unknown names and for keywords that the method does not have.
    """
    if not isinstance(name, str):
        raise TypeError(f"the method must be a name, got {name!r}")
    label = name.removesuffix(CORRECTED_SUFFIX)
    if label not in METHOD_CLASSES:
        raise ValueError(
            f"unknown cache method {name!r}; accepted: {', '.join(METHOD_CLASSES)}, each of Fb, "
            f"Tea, Fast, Ada, Schedule and {', '.join(m.label for m in MODULE_METHODS)} also with "
            f"{CORRECTED_SUFFIX!r}{_did_you_mean(label)}"
        )
    corrected = {"enable_adacorrection": True} if name != label else {}
    return from_flat({"use_cache": label, **flat, **corrected})


def _did_you_mean(label: str) -> str:
    lowered = {each.lower(): each for each in METHOD_CLASSES}
    for word in (label.lower(), label.lower().removesuffix("cache")):
        close = difflib.get_close_matches(word, lowered, n=1, cutoff=0.5)
        if close:
            return f"; did you mean {lowered[close[0]]!r}?"
    return ""


def from_flat(options: Mapping[str, Any]) -> Method:
    """Options from a flat mapping with ``use_cache`` and ``enable_adacorrection``.

    Raises `ValueError` or `TypeError` that names the option, and for one that cannot act on the
    method the methods that have it.
    """
    options = dict(options)
    label = options.pop("use_cache", "Auto")
    check_choice("use_cache", label, tuple(METHOD_CLASSES))
    method = METHOD_CLASSES[label]
    enabled = options.pop("enable_adacorrection", False)
    check_flag("enable_adacorrection", enabled)
    mode = options.pop("adacorr_mode", "adaptive")
    check_choice("adacorr_mode", mode, ADACORR_MODES)
    if mode == "literal" and (not enabled or method in (Auto, Schedule, *MODULE_METHODS)):
        raise ValueError(
            "adacorr_mode must be 'adaptive' for "
            f"{label}: Fb, Tea, Fast and Ada with AdaCorrection have the literal one"
        )
    if enabled and method in (Learned, Replay):
        raise ValueError(f"enable_adacorrection must be False for {label}: it stands alone")
    names = flat_names(method)
    own = {names[name]: options.pop(name) for name in list(options) if name in names}
    if method is Schedule:
        own |= _schedule_options(options)
    if enabled and method is not Auto:
        own["correction"] = _correction(mode, method, options)
    _refuse(options, label + (CORRECTED_SUFFIX if "correction" in own else ""))
    return _made(method, own, names)


def _made(kind: type, own: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """``kind(**own)``; its errors name the flat keyword (``names``: keyword -> field)."""
    try:
        return kind(**own)
    except (TypeError, ValueError) as error:
        field, _, rest = str(error).partition(" ")
        keyword = next((flat for flat, name in names.items() if name == field), field)
        raise type(error)(f"{keyword} {rest}") from error


def _schedule_options(options: dict[str, Any]) -> dict[str, Any]:
    given, own = options.pop("schedule", None), {}
    if isinstance(given, int) and not isinstance(given, bool):
        own["every"] = given
        if given < 1:
            raise ValueError(f"schedule must be a whole number of at least 1, got {given}")
    elif given is not None:
        own["steps"] = given
    if (stand_in := options.pop("stand_in", None)) is not None:
        check_choice("stand_in", stand_in, tuple(STAND_INS))
        own["forecast"] = STAND_INS[stand_in]
    own["stored"] = options.pop("calibration", None)
    return own


def _correction(mode: str, method: type[Method], options: dict[str, Any]) -> Any:
    if method is Schedule:
        return AdaCorrection()
    kind = AdaCorrection if mode == "adaptive" else Literal
    names = {flat: name for name, flat in CORRECTION_NAMES.items()}
    accepted = {f.name for f in fields(kind)}
    taken = [flat for flat in options if names.get(flat) in accepted]
    return _made(kind, {names[flat]: options.pop(flat) for flat in taken}, names)


def _refuse(left: Mapping[str, Any], name: str) -> None:
    """Raise `ValueError` for options that the method does not have; None counts as not given."""
    takers = _takers()
    for option, value in left.items():
        if option not in takers:
            accepted = sorted({*takers, *OTHERS})
            field = {**FLAT_NAMES, **CORRECTION_NAMES}.get(option)
            close = [field] if field else difflib.get_close_matches(option, accepted, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown option {option!r}; accepted: {', '.join(accepted)}{hint}")
        if value is not None:
            raise ValueError(f"{option} is an option of {', '.join(takers[option])}, not of {name}")


def to_flat(method: Method) -> dict[str, Any]:
    """The inverse of `from_flat`: what is not at its default, and the method."""
    flat: dict[str, Any] = {"use_cache": method.label}
    correction = getattr(method, "correction", None)
    flat["enable_adacorrection"] = correction is not None
    for keyword, name in flat_names(type(method)).items():
        default = next(f.default for f in fields(method) if f.name == name)
        value = getattr(method, name)
        if value != default:
            flat[keyword] = value.to_dict() if name == "trace" else value
    if isinstance(method, Schedule):
        flat |= {
            "schedule": method.given,
            "stand_in": {v: k for k, v in STAND_INS.items()}.get(method.forecast),
            "calibration": method.stored,
        }
        flat = {
            k: v for k, v in flat.items() if (v is not None and v is not False) or k == OTHERS[1]
        }
    elif correction is not None:
        if isinstance(correction, Literal):
            flat["adacorr_mode"] = "literal"
        for f in fields(correction):
            if getattr(correction, f.name) != f.default:
                flat[CORRECTION_NAMES[f.name]] = getattr(correction, f.name)
    return flat


class CacheConfig:
    """The flat options of the first release: makes the option class of the method they name.

    ``CacheConfig(use_cache="Fb", rel_l1_thresh=0.1)`` is ``Fb(threshold=0.1)``.
    """

    def __new__(cls, **options: Any) -> Method:
        return from_flat(options)

    from_name = staticmethod(method_named)
    from_dict = staticmethod(from_flat)


_FILE_KEYS = ("family", "default_method", "methods")


def load_family_config(path: str | Path) -> dict[str, Method]:
    """Read a configuration file: display name -> options, the default method first.

    Raises `FileNotFoundError`, or `ValueError` naming the file, the key and what is accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("methods"), dict):
        raise ValueError(f"config: {path} must map {', '.join(_FILE_KEYS)}, methods to options")
    unknown = sorted(set(content) - set(_FILE_KEYS))
    if unknown:
        raise ValueError(
            f"config: {path}: unknown key {unknown}; accepted: {', '.join(_FILE_KEYS)}"
        )
    methods = {}
    for name, options in content["methods"].items():
        try:
            methods[name] = method_named(name, **(options or {}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"config: {path}: {name}: {error}") from error
    default = content.get("default_method", next(iter(methods)))
    if default not in methods:
        raise ValueError(f"config: {path}: default_method must be one of {', '.join(methods)}")
    return {default: methods.pop(default), **methods}


def load_config(path: str | Path, method: str | None = None) -> Method:
    """Read one method's options from a file; None takes the file's default method."""
    methods = load_family_config(path)
    if method is None:
        return next(iter(methods.values()))
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)} (in {path}), got {method!r}")
    return methods[method]
