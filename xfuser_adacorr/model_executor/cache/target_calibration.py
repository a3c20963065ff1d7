"""Calibration of targets: stored beside a model, bound to it by a fingerprint."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from xfuser_adacorr.config import TARGETS, CacheConfig
from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.core.targets import PsnrRelation

from .calibration import calibration_path, model_fingerprint
from .correction.targets import TargetCalibration

TARGETS_FILE = "targets.json"


def save_target_calibration(
    path: Path, calibration: TargetCalibration, transformer: nn.Module, settings: Mapping[str, Any]
) -> None:
    """Write the profile of rates and the relation to PSNR, with the model's fingerprint."""
    content = {
        "method": "targets",
        "fingerprint": model_fingerprint(transformer),
        "profile": calibration.profile.points,
        "psnr": asdict(calibration.relation),
        "settings": dict(settings),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_target_calibration(
    transformer: nn.Module, config: CacheConfig
) -> TargetCalibration | None:
    """What a target needs to know of the model; None without a target.

    A compute target does with equal rates where there is no file. Raises `ValueError` for a
    ``target_psnr`` without one, and for another model's.
    """
    if all(getattr(config, name) is None for name in TARGETS):
        return None
    path = calibration_path(transformer, TARGETS_FILE, None)
    if path is None and config.target_psnr is not None:
        raise ValueError(
            f"target_psnr needs a calibration of the model: there is no {TARGETS_FILE} beside its "
            "weights; make it with scripts/calibrate_targets.py, or set target_compute or "
            "adacorr_tolerance"
        )
    if path is None:
        return TargetCalibration()
    try:
        content = json.loads(path.read_text())
        profile = Profile(tuple((float(x), float(y)) for x, y in content["profile"]))
        psnr = content["psnr"]
        relation = PsnrRelation(float(psnr["at_one"]), float(psnr["slope"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"targets: {path} is not a calibration of targets ({error})") from error
    if content.get("fingerprint") != model_fingerprint(transformer):
        raise ValueError(
            f"targets: {path} was made for another model; calibrate this one or remove the file"
        )
    return TargetCalibration(profile, relation)
