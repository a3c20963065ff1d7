"""AdaCache's codebook fitted to a model, and stored beside it."""

import numpy as np
import pytest
import torch

from tests.published_ada import EVERY_STEP, STEPS, PublishedRule, flux_reference
from tests.tiny import euler, make_tiny_flux
from xfuser_adacorr import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.calibration.ada import AdaRecorder, step_shares
from xfuser_adacorr.model_executor.cache.calibration.files import (
    load_ada_codebook,
    save_ada_codebook,
)
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX
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
    with pytest.raises(ValueError, match="is not an AdaCache calibration"):
        load_ada_codebook(transformer, str(path))


def test_recorder_measures_the_changes_of_uncached_runs(sampler):
    rule, recorder = PublishedRule(EVERY_STEP), AdaRecorder()
    expected = euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    with recorder.attached(sampler.transformer, FLUX):
        for _ in range(2):
            assert torch.allclose(sampler.run(STEPS), expected, rtol=1e-5, atol=1e-5)
    assert recorder.changes == pytest.approx(2 * rule.changes[:-1], rel=1e-4)
    assert not hasattr(sampler.transformer, "_cache_call_handler")


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5, 0.8])
def test_fitted_codebook_covers_shares_that_give_the_fraction(fraction):
    rates = (6, 5, 4, 3, 2, 1)
    shares = step_shares(fraction, rates)
    assert shares.sum() == pytest.approx(1.0)
    assert (shares / np.array(rates)).sum() == pytest.approx(fraction, abs=1e-6)
    recorder = AdaRecorder(changes=np.linspace(0.01, 0.4, 5000).tolist())
    codebook = recorder.fit(fraction, rates)
    used = [codebook.rate(c) for c in recorder.changes]
    assert sum(1 / rate for rate in used) / len(used) == pytest.approx(fraction, rel=2e-3)


def test_a_fit_says_what_it_needs():
    with pytest.raises(ValueError, match="compute_fraction must be between 0.250 and 0.500"):
        step_shares(0.6, (4, 3, 2))
    with pytest.raises(ValueError, match="needs at least 12 changes, got 3"):
        AdaRecorder(changes=[0.1, 0.2, 0.3]).fit(0.3, (4, 3, 2))
