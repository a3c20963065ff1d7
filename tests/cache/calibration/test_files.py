"""Calibration files: stored beside a model, and bound to it."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from tests.tiny import make_tiny_flux
from xfuser_adacorr import TeaPolynomial
from xfuser_adacorr.model_executor.cache.calibration.fast import load_fast_maps, save_fast_maps
from xfuser_adacorr.model_executor.cache.calibration.files import (
    model_fingerprint,
    written_whole,
)
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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "file"
    with written_whole(path) as partial:
        partial.write_text("first")
    full = not isinstance(error, KeyboardInterrupt)
    said = {"match": f"output: {path} could not be written: .*No space left"} if full else {}
    with pytest.raises(OSError if full else KeyboardInterrupt, **said):
        with written_whole(path) as partial:
            partial.write_text("sec")
            raise error
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
