"""AdaCache's codebook, stored beside its model."""

import pytest

from tests.tiny import make_tiny_flux
from xfuser_adacorr import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.calibration.ada import (
    load_ada_codebook,
    save_ada_codebook,
)
from xfuser_adacorr.model_executor.cache.methods.codebook import Codebook


def test_calibrated_codebook_is_bound_to_its_model(tmp_path, sampler):
    model, path = sampler.transformer, tmp_path / "adacache.json"
    codebook = Codebook.of({0.1: 4, 1e9: 3})
    save_ada_codebook(path, codebook, model, {"num_inference_steps": 30})
    assert load_ada_codebook(model, str(path)) == codebook
    with pytest.raises(ValueError, match="was made for another model"):
        load_ada_codebook(make_tiny_flux(seed=1), str(path))
    model.register_to_config(_name_or_path=str(tmp_path))
    for options, used in (({}, codebook), ({"codebook": "fast"}, "fast")):
        enable_cache(model, "Ada", num_steps=30, **options)
        assert site_of(model).stack.method.codebook == used
        disable_cache(model)


@pytest.mark.parametrize(
    "text",
    [
        "junk",
        "{}",
        '{"codebook": [[0.2, 1], [0.1, 1]]}',
        '{"codebook": [[0.2, 1]], "method": "Tea"}',
    ],
)
def test_calibration_files_that_are_none_are_rejected(tmp_path, transformer, text):
    path = tmp_path / "junk.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match="is not an AdaCache calibration|is not a calibration of Ada"
    ):
        load_ada_codebook(transformer, str(path))
