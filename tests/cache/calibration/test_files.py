"""Calibration files: stored beside a model, and bound to it."""

import pytest
import torch

from tests.tiny import make_tiny_flux
from xfuser_adacorr import TeaPolynomial
from xfuser_adacorr.model_executor.cache.calibration.fast import load_fast_maps, save_fast_maps
from xfuser_adacorr.model_executor.cache.calibration.files import model_fingerprint
from xfuser_adacorr.model_executor.cache.calibration.tea import (
    load_tea_polynomial,
    save_tea_polynomial,
)


def test_tea_calibration_is_bound_to_its_model(tmp_path, transformer):
    path = tmp_path / "teacache.json"
    polynomial = TeaPolynomial(coefficients=(1.0, 2.0), domain=(0.0, 0.5))
    save_tea_polynomial(path, polynomial, transformer, {"steps": 50})
    assert load_tea_polynomial(transformer, str(path)) == polynomial
    with pytest.raises(ValueError, match="was made for another model"):
        load_tea_polynomial(make_tiny_flux(seed=1), str(path))
    transformer.register_to_config(_name_or_path=str(tmp_path))
    assert load_tea_polynomial(transformer, None) == polynomial, "beside the model"


def test_calibration_files_that_are_none_are_rejected(tmp_path, transformer):
    path = tmp_path / "junk"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a TeaCache calibration"):
        load_tea_polynomial(transformer, str(path))
    with pytest.raises(ValueError, match="not a FastCache calibration"):
        load_fast_maps(transformer, str(path))
    with pytest.raises(FileNotFoundError, match="calibration: no file"):
        load_fast_maps(transformer, str(tmp_path / "none"))
    save_fast_maps(path, {"blocks.0.hidden_states.weight": torch.zeros(2, 2)}, transformer, {})
    with pytest.raises(ValueError, match="not a TeaCache calibration"):
        load_tea_polynomial(transformer, str(path))


def test_fingerprint_knows_the_weights_but_not_the_dtype(transformer):
    rounded = transformer.half()
    fingerprint = model_fingerprint(rounded)
    assert model_fingerprint(rounded.float()) == fingerprint
    rounded.proj_out.weight.mul_(1.5)
    assert model_fingerprint(rounded) != fingerprint
