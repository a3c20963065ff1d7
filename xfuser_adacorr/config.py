"""Options of a cache, validated once, from Python, dictionaries and YAML files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from xfuser_adacorr.core.codebook import PUBLISHED_NAMES, Codebook
from xfuser_adacorr.core.refreshes import checked_schedule

METHODS = ("Fb", "Tea", "Fast", "Ada", "Auto")
"""Base methods; ``Auto`` is AdaCorrection's own refresh rule."""
PLANNED_METHODS = ("Schedule", "Replay")
"""Methods that are told which calls to compute: by a list of steps, or by a saved trace."""

CALIBRATED_METHODS = ("Tea", "Fast", "Ada", "Schedule")
STAND_INS = ("reuse", "forecast")
RELATIVE = "relative"
"""The other ``moreg`` than the published one."""
TARGETS = ("target_compute", "target_speedup", "target_psnr")

ADACORR_MODES = ("adaptive", "literal")
CORRECTED_SUFFIX = "+AdaCorrection"


def _check_number(name: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _check_count(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Which calls of a transformer are computed, and what stands in for the others.

    Raises `ValueError` or `TypeError` that names the option and what is accepted.
    """

    use_cache: str = "Auto"
    """Base method: one of `METHODS` or `PLANNED_METHODS`."""
    rel_l1_thresh: float | None = None
    """Threshold of the base method's relative change, >= 0; None: the family's default, which is
    looser where AdaCorrection is on. For Ada a factor of its codebook's thresholds, None: 1."""
    motion_threshold: float = 0.1
    """Fast with ``static_tokens``: saliency over the largest up to which a token is static."""
    static_tokens: bool = False
    """Fast: static tokens bypass the blocks through one map of the whole stack."""
    warmup_steps: int = 0
    """Calls at the start of every branch that are always computed (the first one always is)."""
    num_steps: int | None = None
    """Sampling steps; None: taken from the scheduler, or inferred from the timesteps."""
    calibration: str | None = None
    """Calibration file of Tea, Fast or Ada, or a stored schedule; None: the one beside the model,
    if there is one."""
    codebook: str | Mapping[float, int] | Sequence[tuple[float, int]] | None = None
    """Ada: ``fast`` or ``slow`` as published, or {threshold: rate}, thresholds rising (kept as a
    tuple of pairs); None: the calibrated one, else ``fast``."""
    moreg: bool | str = False
    """Ada: Motion Regularization, for models of videos: as published (True), or ``relative`` to the
    model's mean motion, which needs a calibration of the model (`scripts/calibrate_ada.py`)."""
    moreg_divisor: float = 1.0
    """Ada with published ``moreg``: d, which divides the motion, > 0; its code divides by 1."""
    schedule: int | Sequence[int] | Sequence[bool] | None = None
    """Schedule: N for a computed call every N steps, counted from the last one; the indices of the
    computed steps; or a mask of the run's length (kept as tuples). Step 0 is always computed.
    None: the stored schedule."""
    schedule_interpolation: bool = False
    """Schedule: place a stored schedule by noise level where the run's steps are others."""
    stand_in: str | None = None
    """Schedule without AdaCorrection: ``reuse`` of the stack's residual (None), or the order-1
    ``forecast`` of the model's output."""
    trace: Any = field(default=None, hash=False)
    """Replay: the `Trace` whose decisions are taken, or the path of a saved one."""
    enable_adacorrection: bool = False
    """Correct the base method (always on for ``Auto`` in adaptive mode)."""
    adacorr_gamma: float = 1.0
    """gamma in the correction weight w = clip(gamma * S, 0, 1); 0: never refresh for w."""
    adacorr_lambda: float = 1.0
    """lambda, weight of the spatial term in the offset score S."""
    adacorr_tolerance: float | None = None
    """Relative error of the latents tolerated between two refreshes; None: the family's default."""
    adacorr_mode: str = "adaptive"
    """``adaptive`` saves compute; ``literal`` is the published per-layer blend and saves none."""
    target_compute: float | None = None
    """Compute fraction of the run to be held, in (0, 1], in place of ``adacorr_tolerance``."""
    target_speedup: float | None = None
    """The same as its inverse, >= 1: counted compute, not wall-clock time."""
    target_psnr: float | None = None
    """PSNR in dB against the uncached picture to be expected, > 0, in place of
    ``adacorr_tolerance``; needs a calibration of the model (`scripts/calibrate_targets.py`)."""
    per_sample: bool = False
    """Auto: each sample of a batch is refreshed when it needs it, those of a call together in a
    smaller batch; otherwise one decision holds for the whole batch."""

    def __post_init__(self) -> None:
        if self.use_cache not in (*METHODS, *PLANNED_METHODS):
            raise ValueError(
                f"use_cache must be one of {', '.join((*METHODS, *PLANNED_METHODS))}, "
                f"got {self.use_cache!r}"
            )
        if self.adacorr_mode not in ADACORR_MODES:
            raise ValueError(
                f"adacorr_mode must be one of {', '.join(ADACORR_MODES)}, got {self.adacorr_mode!r}"
            )
        _check_number("rel_l1_thresh", self.rel_l1_thresh, optional=True)
        _check_number("motion_threshold", self.motion_threshold)
        _check_number("adacorr_gamma", self.adacorr_gamma)
        _check_number("adacorr_lambda", self.adacorr_lambda)
        _check_number("adacorr_tolerance", self.adacorr_tolerance, optional=True)
        if self.motion_threshold > 1:
            raise ValueError(f"motion_threshold must be in [0, 1], got {self.motion_threshold}")
        if self.adacorr_tolerance == 0:
            raise ValueError("adacorr_tolerance must be above 0; disable the cache to compute all")
        _check_count("warmup_steps", self.warmup_steps, least=0)
        _check_count("num_steps", self.num_steps, least=1, optional=True)
        _check_flag("static_tokens", self.static_tokens)
        _check_flag("enable_adacorrection", self.enable_adacorrection)
        if self.static_tokens and self.use_cache != "Fast":
            raise ValueError(f"static_tokens is an option of Fast, not of {self.use_cache}")
        if self.calibration is not None and self.use_cache not in CALIBRATED_METHODS:
            raise ValueError(
                f"calibration is an option of Tea, Fast, Ada and Schedule, not of {self.use_cache}"
            )
        self._check_ada()
        if self.use_cache == "Auto":
            object.__setattr__(self, "enable_adacorrection", True)
        self._check_schedule()
        self._check_replay()
        self._check_targets()
        self._check_per_sample()

    def _check_ada(self) -> None:
        if isinstance(self.moreg, str) and self.moreg != RELATIVE:
            raise ValueError(f"moreg must be True, False or {RELATIVE!r}, got {self.moreg!r}")
        if not isinstance(self.moreg, str):
            _check_flag("moreg", self.moreg)
        _check_number("moreg_divisor", self.moreg_divisor)
        if self.moreg_divisor == 0:
            raise ValueError("moreg_divisor must be above 0")
        if self.moreg == RELATIVE and self.moreg_divisor != 1:
            raise ValueError(f"moreg_divisor must be 1 with moreg={RELATIVE!r}: nothing is divided")
        for name, given in (("codebook", self.codebook is not None), ("moreg", bool(self.moreg))):
            if given and self.use_cache != "Ada":
                raise ValueError(f"{name} is an option of Ada, not of {self.use_cache}")
        if self.codebook is not None and self.calibration is not None:
            raise ValueError("codebook and calibration: give one of them, both name a codebook")
        if isinstance(self.codebook, str):
            if self.codebook not in PUBLISHED_NAMES:
                raise ValueError(
                    f"codebook must be one of {', '.join(PUBLISHED_NAMES)}, or a mapping of "
                    f"thresholds to rates, got {self.codebook!r}"
                )
        elif self.codebook is not None:
            object.__setattr__(self, "codebook", Codebook.of(self.codebook).entries)

    def _check_schedule(self) -> None:
        _check_flag("schedule_interpolation", self.schedule_interpolation)
        if self.stand_in is not None and self.stand_in not in STAND_INS:
            raise ValueError(
                f"stand_in must be one of {', '.join(STAND_INS)}, got {self.stand_in!r}"
            )
        given = {
            "schedule": self.schedule is not None,
            "schedule_interpolation": self.schedule_interpolation,
            "stand_in": self.stand_in is not None,
        }
        if self.use_cache != "Schedule":
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"{name} is an option of Schedule, not of {self.use_cache}")
            return
        if self.schedule is not None:
            for name in ("calibration", "schedule_interpolation"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for a stored schedule: leave schedule at None")
            object.__setattr__(self, "schedule", checked_schedule(self.schedule))
        if self.stand_in is not None and self.enable_adacorrection:
            raise ValueError("stand_in must be None with AdaCorrection: its forecast stands in")
        if self.warmup_steps:
            raise ValueError("warmup_steps must be 0 for Schedule: list the steps in the schedule")
        idle = ("rel_l1_thresh", "adacorr_tolerance")
        if self.adacorr_mode == "adaptive":
            idle += ("adacorr_gamma", "adacorr_lambda")
        self._refuse_others(idle, "the schedule alone decides")

    def _check_replay(self) -> None:
        if self.use_cache != "Replay":
            if self.trace is not None:
                raise ValueError(f"trace is an option of Replay, not of {self.use_cache}")
            return
        if self.trace is None:
            raise ValueError("trace must be given for Replay: a Trace, or the path of a saved one")
        if isinstance(self.trace, Path):
            object.__setattr__(self, "trace", str(self.trace))
        others = [f.name for f in fields(self) if f.name not in ("use_cache", "trace", "num_steps")]
        self._refuse_others(others, "the trace says how it was made")

    def _refuse_others(self, names: Sequence[str], reason: str) -> None:
        """Raise `ValueError` for the first of these options that is not at its default."""
        for f in fields(self):
            if f.name in names and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name} must be left at {f.default!r} for {self.use_cache}: {reason}; "
                    f"got {getattr(self, f.name)!r}"
                )

    def _check_targets(self) -> None:
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        for name in targets:
            _check_number(name, getattr(self, name))
        if not targets:
            return
        given = targets + (["adacorr_tolerance"] if self.adacorr_tolerance is not None else [])
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them, each sets the tolerance")
        name, value = targets[0], getattr(self, targets[0])
        if self.use_cache in PLANNED_METHODS or not self.forecasts_output:
            raise ValueError(
                f"{name} is an option of Auto and of methods with AdaCorrection in adaptive mode, "
                f"not of {self.name}"
            )
        accepted = {
            "target_compute": ("in (0, 1]", 0 < value <= 1),
            "target_speedup": ("at least 1", value >= 1),
            "target_psnr": ("above 0 dB", value > 0),
        }
        if not accepted[name][1]:
            raise ValueError(f"{name} must be {accepted[name][0]}, got {value!r}")
        if self.adacorr_gamma == 0:
            raise ValueError(f"adacorr_gamma must be above 0 with {name}: at 0 nothing is steered")

    def _check_per_sample(self) -> None:
        _check_flag("per_sample", self.per_sample)
        if self.per_sample and (self.use_cache != "Auto" or self.adacorr_mode != "adaptive"):
            raise ValueError(
                "per_sample is an option of Auto in adaptive mode, which decides before the "
                f"transformer is entered, not of {self.name} in {self.adacorr_mode} mode"
            )

    @property
    def compute_target(self) -> float | None:
        """Compute fraction to be held, from ``target_compute`` or ``target_speedup``."""
        if self.target_speedup is not None:
            return 1.0 / self.target_speedup
        return self.target_compute

    @property
    def forecasts_output(self) -> bool:
        """Whether a forecast of the model's output stands in, in place of values in the stack."""
        corrected = self.enable_adacorrection and self.adacorr_mode == "adaptive"
        return corrected or self.stand_in == "forecast"

    @property
    def name(self) -> str:
        """Display name: ``Fb``, ``Fb+AdaCorrection``, ``Auto``."""
        corrected = self.enable_adacorrection and self.use_cache != "Auto"
        return self.use_cache + (CORRECTED_SUFFIX if corrected else "")

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        if hasattr(self.trace, "to_dict"):
            content["trace"] = self.trace.to_dict()
        return content

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "CacheConfig":
        """Build from a mapping; unknown keys raise `ValueError`."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"unknown option {', '.join(map(repr, unknown))}; accepted: {', '.join(known)}"
            )
        return cls(**options)

    @classmethod
    def from_name(cls, name: str, **options: Any) -> "CacheConfig":
        """Build from a display name such as ``Fast`` or ``Fast+AdaCorrection``."""
        base = name.removesuffix(CORRECTED_SUFFIX)
        if base not in (*METHODS, *PLANNED_METHODS):
            raise ValueError(
                f"unknown cache method {name!r}; accepted: "
                f"{', '.join((*METHODS, *PLANNED_METHODS))}, "
                f"each with or without {CORRECTED_SUFFIX!r}"
            )
        if name != base:
            options = {**options, "enable_adacorrection": True}
        return cls.from_dict({**options, "use_cache": base})


_FILE_KEYS = ("family", "default_method", "methods")


def load_family_config(path: str | Path) -> dict[str, CacheConfig]:
    """Read a configuration file: display name -> `CacheConfig`, the default method first.

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
    configs = {}
    for name, options in content["methods"].items():
        try:
            configs[name] = CacheConfig.from_name(name, **(options or {}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"config: {path}: {name}: {error}") from error
    default = content.get("default_method", next(iter(configs)))
    if default not in configs:
        raise ValueError(f"config: {path}: default_method must be one of {', '.join(configs)}")
    return {default: configs.pop(default), **configs}


def load_config(path: str | Path, method: str | None = None) -> CacheConfig:
    """Read one method's configuration from a file; None takes the file's default method."""
    configs = load_family_config(path)
    if method is None:
        return next(iter(configs.values()))
    if method not in configs:
        raise ValueError(f"method must be one of {', '.join(configs)} (in {path}), got {method!r}")
    return configs[method]
