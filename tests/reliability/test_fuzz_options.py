"""Any combination of options acts, or is refused by an error that names one of them."""

import re

from hypothesis import strategies as st

from tests.reliability.fuzz import fuzzed
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Method, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.config import METHOD_CLASSES, from_flat, method_named

STEPS = 6
VALUES = {
    "rel_l1_thresh": [0.0, 0.1, 5.0, -1, float("nan"), "much", True],
    "warmup_steps": [0, 1, 3, 100, -1, 1.5, "2"],
    "num_steps": [1, STEPS, 50, 0, "6"],
    "adacorr_tolerance": [1e-6, 0.01, 3.0, 0, float("inf"), "x"],
    "adacorr_gamma": [0, 0.5, 1, 100.0, -0.1],
    "adacorr_lambda": [0, 1.0, 10, -1],
    "adacorr_mode": ["adaptive", "literal", "exact"],
    "target_compute": [0.01, 0.5, 1, 0, 1.1],
    "target_speedup": [1, 2.5, 100, 0.9],
    "target_psnr": [20.0, 40, -5, "40"],
    "use_plan": [True, False, 1],
    "learn": [1, 0, 2.5],
    "enable_adacorrection": [True, False, "yes"],
    "schedule": [1, 3, [0, 2], [2, 0, 5], [True] * STEPS, [True], [0, 9], 0, [-1], "all"],
    "stand_in": ["reuse", "last", "forecast", "none"],
    "schedule_interpolation": [True, False, 3],
    "codebook": ["fast", "slow", {0.1: 3, 1.0: 1}, [(0.5, 2)], "medium", {}, {0.5: 0}],
    "moreg": [False, True, 1],
    "moreg_divisor": [1.0, 2.0, 0],
    "static_tokens": [False, True, "no"],
    "motion_threshold": [0.1, 0.5, 1.5],
    "unknown_option": [1],
}
"""Flat options, with values that are accepted and values that are not."""
ALIASES = {
    "adacorr_gamma": "gamma",
    "adacorr_lambda": "lambda_",
    "adacorr_tolerance": "tolerance",
    "rel_l1_thresh": "threshold",
    "schedule": "steps|every|mask",
    "stand_in": "forecast",
    "enable_adacorrection": "AdaCorrection|correction",
    "schedule_interpolation": "interpol",
}
"""What an option is called by an error that is about several of them."""
NAMES = [*METHOD_CLASSES, *(f"{label}+AdaCorrection" for label in METHOD_CLASSES), "fb", "None"]

options = st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(VALUES[name]) for name in names})
)


def names_an_option(error, given):
    """Whether the message has the name of an option, given or missing, or of the method."""
    words = [*VALUES, *(ALIASES.get(name, name) for name in given)]
    words += [
        *METHOD_CLASSES,
        "method",
        "trace",
        "calibration",
        "plan",
        "scheduler",
        "threshold",
        "codebook",
    ]
    return re.search("|".join(words), str(error)) is not None


def made(name, given):
    """The method, or None where it is refused as it should be."""
    try:
        return method_named(name, **given)
    except (TypeError, ValueError) as error:
        assert names_an_option(error, given), error
        return None


@fuzzed(150, name=st.sampled_from(NAMES), given=options)
def test_options_make_a_method_that_has_them_or_are_refused_by_name(name, given):
    method = made(name, given)
    if method is None:
        return
    assert isinstance(method, Method)
    assert from_flat(method.to_dict()) == method
    neutral = {"adacorr_mode": ("adaptive",), "enable_adacorrection": (False, True)}
    flat = method.to_dict()
    for option, value in given.items():
        unlike = type(method)() if method.label != "Replay" else method
        default = unlike.to_dict().get(option)
        assert (
            option in flat
            or value == default
            or option in neutral
            or _is_default(method, option, value)
        ), f"{option} is ignored"


def _is_default(method, option, value):
    """Left out of the flat form because it is what the method has anyway."""
    changed = dict(method.to_dict())
    changed[option] = value
    return from_flat(changed) == method


@fuzzed(
    12,
    name=st.sampled_from([name for name in NAMES if not name.startswith(("Learned", "Replay"))]),
    given=options,
    bare=st.booleans(),
)
def test_a_method_that_is_made_runs_or_is_refused_by_name(name, given, bare):
    method = made(name, given)
    if method is None:
        return
    sampler = FluxSampler(make_tiny_flux())
    scheduler = None if bare else sampler.scheduler
    try:
        enable_cache(sampler.transformer, method, scheduler=scheduler)
    except FileNotFoundError as error:
        assert re.search("calibration|plan|schedule", str(error))
        return
    except (TypeError, ValueError) as error:
        assert names_an_option(error, given), error
        return
    try:
        x = sampler.run(STEPS, finish=False)
    except ValueError as error:
        assert names_an_option(error, given), error
    else:
        told = given.get("num_steps", STEPS) if bare else STEPS  # where a bare model's runs end
        last = (STEPS - 1) % told + 1
        assert x.isfinite().all() and cache_summary(sampler.transformer).num_steps == last
    finally:
        disable_cache(sampler.transformer)
