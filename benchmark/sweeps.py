"""The settings of each method's knob that a sweep tries, by family."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.method_names import CORRECTED

Sweeps = Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]
"""Steps -> method -> options tried. Other step counts take the lists of the nearest one."""


def _over(knob: str, *values: float) -> list[dict[str, Any]]:
    return [{knob: value} for value in values]


def _corrected(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """Thresholds, looser than the base method's own, with the tolerance that makes up for it."""
    return [{"rel_l1_thresh": x, "adacorr_tolerance": tolerance} for x, tolerance in points]


def _published(knobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ada's knobs with the codebook named: one calibrated for the model would take its place."""
    return [{**knob, "codebook": "fast"} for knob in knobs]


_FLUX: Sweeps = {
    28: {
        "Fb": _over("rel_l1_thresh", 0.12, 0.16, 0.2, 0.28, 0.36),
        "Fb" + CORRECTED: _corrected(
            (0.12, 0.01), (0.2, 0.01), (0.35, 0.01), (0.35, 0.02), (0.6, 0.04), (0.6, 0.15)
        ),
        "Tea": _over("rel_l1_thresh", 0.1, 0.14, 0.18, 0.25, 0.32),
        "Tea" + CORRECTED: _corrected(
            (0.1, 0.02), (0.14, 0.02), (0.18, 0.02), (0.3, 0.02), (0.3, 0.05), (0.45, 0.05)
        ),
        "Fast": _over("rel_l1_thresh", 0.045, 0.055, 0.08, 0.1, 0.14, 0.18),
        "Fast" + CORRECTED: _corrected(
            (0.08, 0.01), (0.1, 0.01), (0.18, 0.01), (0.32, 0.01), (0.32, 0.04), (0.6, 0.08)
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.21, 0.25, 0.32, 0.4, 0.6, 1.6)),
        "Ada" + CORRECTED: _published(
            _corrected((0.2, 0.01), (0.4, 0.01), (0.8, 0.02), (1.6, 0.05))
        ),
        "Auto": _over("adacorr_tolerance", 0.0015, 0.003, 0.006, 0.012, 0.025, 0.05),
    },
    50: {
        "Fb": _over("rel_l1_thresh", 0.065, 0.08, 0.11, 0.16, 0.22),
        "Fb" + CORRECTED: _corrected(
            (0.065, 0.01), (0.1, 0.01), (0.16, 0.01), (0.27, 0.005), (0.27, 0.02)
        ),
        "Tea": _over("rel_l1_thresh", 0.055, 0.08, 0.11, 0.15, 0.2),
        "Tea" + CORRECTED: _corrected(
            (0.055, 0.01), (0.08, 0.01), (0.11, 0.01), (0.15, 0.01), (0.25, 0.005)
        ),
        "Fast": _over("rel_l1_thresh", 0.027, 0.034, 0.045, 0.06, 0.08, 0.1),
        "Fast" + CORRECTED: _corrected(
            (0.04, 0.01), (0.05, 0.01), (0.06, 0.01), (0.1, 0.01), (0.16, 0.003), (0.16, 0.006)
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.12, 0.15, 0.2, 0.3, 0.4, 0.6)),
        "Ada" + CORRECTED: _published(
            _corrected((0.12, 0.01), (0.2, 0.01), (0.3, 0.01), (0.6, 0.02))
        ),
        "Auto": _over("adacorr_tolerance", 0.0005, 0.001, 0.002, 0.004, 0.008),
    },
}

_PIXART: Sweeps = {
    20: {
        "Fb": _over("rel_l1_thresh", 0.15, 0.2, 0.3, 0.45, 0.7),
        "Fb" + CORRECTED: _corrected(
            (0.7, 1), (0.7, 0.2), (0.7, 0.05), (0.7, 0.0125), (1.5, 0.1), (1.5, 0.4)
        ),
        "Tea": _over("rel_l1_thresh", 0.04, 0.06, 0.09, 0.13, 0.18),
        "Tea" + CORRECTED: _corrected(
            (0.18, 1), (0.18, 0.2), (0.18, 0.05), (0.18, 0.0125), (0.4, 0.1), (0.4, 0.4)
        ),
        "Fast": _over("rel_l1_thresh", 0.03, 0.045, 0.065, 0.09, 0.13),
        "Fast" + CORRECTED: _corrected(
            (0.065, 1), (0.065, 0.2), (0.065, 0.05), (0.065, 0.0125), (0.4, 0.1), (0.4, 0.4)
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.4, 0.6, 0.9, 1.4, 2.0, 3.0)),
        "Ada" + CORRECTED: _published(
            _corrected((3, 1), (3, 0.1), (3, 0.025), (3, 0.0125), (6, 0.1), (6, 0.4))
        ),
        "Auto": _over("adacorr_tolerance", 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 1),
    },
    50: {
        "Fb": _over("rel_l1_thresh", 0.08, 0.11, 0.15, 0.2, 0.3),
        "Fb" + CORRECTED: _corrected(
            (0.3, 0.0012), (0.3, 0.003), (0.3, 0.008), (0.3, 0.025), (0.6, 0.008), (0.6, 0.02)
        ),
        "Tea": _over("rel_l1_thresh", 0.025, 0.035, 0.045, 0.06, 0.075),
        "Tea" + CORRECTED: _corrected(
            (0.07, 0.001), (0.07, 0.0025), (0.07, 0.006), (0.07, 0.02), (0.2, 0.006), (0.2, 0.015)
        ),
        "Fast": _over("rel_l1_thresh", 0.016, 0.02, 0.027, 0.035, 0.045),
        "Fast" + CORRECTED: _corrected(
            (0.045, 0.001),
            (0.045, 0.0025),
            (0.045, 0.006),
            (0.045, 0.02),
            (0.25, 0.006),
            (0.25, 0.015),
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.22, 0.3, 0.4, 0.5, 0.7)),
        "Ada" + CORRECTED: _published(
            _corrected(
                (0.7, 0.001), (0.7, 0.0025), (0.7, 0.008), (0.7, 0.02), (3, 0.006), (3, 0.015)
            )
        ),
        "Auto": _over("adacorr_tolerance", 0.001, 0.002, 0.0035, 0.006, 0.012, 0.025),
    },
}

_DIT: Sweeps = {
    28: {
        "Fb": _over("rel_l1_thresh", 0.15, 0.2, 0.27, 0.4, 0.6),
        "Fb" + CORRECTED: _corrected(
            (0.6, 0.004), (0.6, 0.01), (0.6, 0.03), (0.6, 0.1), (0.6, 0.3), (1.5, 0.05), (1.5, 0.15)
        ),
        "Tea": _over("rel_l1_thresh", 0.02, 0.028, 0.04, 0.055, 0.08),
        "Tea" + CORRECTED: _corrected(
            (0.07, 0.005), (0.07, 0.012), (0.07, 0.03), (0.07, 0.1), (0.3, 0.03), (0.3, 0.08)
        ),
        "Fast": _over("rel_l1_thresh", 0.018, 0.026, 0.036, 0.05, 0.07),
        "Fast" + CORRECTED: _corrected(
            (0.05, 0.005), (0.05, 0.012), (0.05, 0.03), (0.05, 0.1), (0.32, 0.03), (0.32, 0.08)
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.35, 0.5, 0.8, 1.2, 2.0, 4.0)),
        "Ada" + CORRECTED: _published(_corrected((4, 0.006), (4, 0.015), (4, 0.05), (4, 0.15))),
        "Auto": _over("adacorr_tolerance", 0.004, 0.006, 0.0125, 0.025, 0.05, 0.1),
    },
    50: {
        "Fb": _over("rel_l1_thresh", 0.1, 0.14, 0.18, 0.25, 0.35),
        "Fb" + CORRECTED: _corrected(
            (0.35, 0.0015), (0.35, 0.004), (0.35, 0.01), (0.35, 0.03), (1, 0.012), (1, 0.03)
        ),
        "Tea": _over("rel_l1_thresh", 0.012, 0.017, 0.022, 0.03, 0.042),
        "Tea" + CORRECTED: _corrected(
            (0.04, 0.0015), (0.04, 0.003), (0.04, 0.007), (0.04, 0.02), (0.15, 0.006), (0.15, 0.015)
        ),
        "Fast": _over("rel_l1_thresh", 0.012, 0.016, 0.021, 0.028, 0.036),
        "Fast" + CORRECTED: _corrected(
            (0.03, 0.0015), (0.03, 0.003), (0.03, 0.007), (0.03, 0.02), (0.15, 0.006), (0.15, 0.015)
        ),
        "Ada": _published(_over("rel_l1_thresh", 0.25, 0.35, 0.5, 0.7, 1.0, 1.6)),
        "Ada" + CORRECTED: _published(
            _corrected((1.6, 0.0015), (1.6, 0.003), (1.6, 0.008), (1.6, 0.025))
        ),
        "Auto": _over("adacorr_tolerance", 0.0012, 0.002, 0.0035, 0.006, 0.01, 0.02),
    },
}

_OPENSORA: Sweeps = {
    30: {
        "Fb": _over("rel_l1_thresh", 0.1, 0.18, 0.28, 0.4),
        "Fb" + CORRECTED: _corrected(
            (0.4, 0.003), (0.4, 0.012), (0.4, 0.05), (0.4, 0.2), (0.8, 0.03), (0.8, 0.1)
        ),
        "Tea": _over("rel_l1_thresh", 0.07, 0.1, 0.15, 0.23),
        "Tea" + CORRECTED: _corrected((0.23, 0.003), (0.23, 0.01), (0.23, 0.04), (0.23, 0.15)),
        "Fast": _over("rel_l1_thresh", 0.035, 0.055, 0.09, 0.14),
        "Fast" + CORRECTED: _corrected((0.14, 0.003), (0.14, 0.01), (0.14, 0.04), (0.14, 0.15)),
        "Ada": _published(_over("rel_l1_thresh", 0.17, 0.25, 0.35, 0.6, 1.6)),
        "Ada" + CORRECTED: _published(
            _corrected((1.6, 0.003), (1.6, 0.01), (1.6, 0.04), (1.6, 0.15))
        ),
        "Auto": _over("adacorr_tolerance", 0.003, 0.006, 0.015, 0.04, 0.12),
    },
    50: {
        "Fb": _over("rel_l1_thresh", 0.06, 0.1, 0.16, 0.25),
        "Fb" + CORRECTED: _corrected((0.25, 0.001), (0.25, 0.003), (0.25, 0.01), (0.25, 0.04)),
        "Tea": _over("rel_l1_thresh", 0.035, 0.055, 0.085, 0.13),
        "Tea" + CORRECTED: _corrected((0.13, 0.001), (0.13, 0.003), (0.13, 0.01), (0.13, 0.04)),
        "Fast": _over("rel_l1_thresh", 0.02, 0.03, 0.05, 0.09),
        "Fast" + CORRECTED: _corrected((0.09, 0.001), (0.09, 0.003), (0.09, 0.01), (0.09, 0.04)),
        "Ada": _published(_over("rel_l1_thresh", 0.1, 0.15, 0.22, 0.35, 0.8)),
        "Ada" + CORRECTED: _published(
            _corrected((0.8, 0.001), (0.8, 0.003), (0.8, 0.01), (0.8, 0.04))
        ),
        "Auto": _over("adacorr_tolerance", 0.0008, 0.0018, 0.004, 0.01, 0.03),
    },
}

SWEEPS = {"flux": _FLUX, "pixart": _PIXART, "dit": _DIT, "opensora": _OPENSORA}
"""By family."""
