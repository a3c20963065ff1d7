"""Codebooks of AdaCache: published, given, and calibrated."""

import numpy as np
import pytest
import torch

from tests.published_ada import EVERY_STEP, STEPS, PublishedRule, flux_reference
from tests.tiny import euler, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.core.codebook import Codebook, published_codebook
from xfuser_adacorr.core.profile import Profile
from xfuser_adacorr.model_executor.cache.calibration import (
    AdaCalibration,
    load_ada_calibration,
    save_ada_calibration,
)
from xfuser_adacorr.model_executor.cache.codebook_fitting import AdaRecorder, step_shares
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX
from xfuser_adacorr.model_executor.cache.engine import engine_of


def test_a_threshold_must_be_above_the_change():
    codebook = Codebook.of({0.25: 4, 0.5: 2, 1.0: 1})
    below = np.nextafter(0.25, 0.0)
    changes = (0.0, below, 0.25, 0.5, 0.75, 1.0, 7.0, float("inf"))
    assert [codebook.rate(c) for c in changes] == [4, 4, 2, 1, 1, 1, 1, 1]
    assert [codebook.rate(c, scale=2.0) for c in (below, 0.25, 0.5, 1.0)] == [4, 4, 2, 1]
    assert codebook.rate(0.0, scale=0.0) == 1


@pytest.mark.parametrize(
    ("name", "steps", "rates"),
    [
        ("fast", 30, [6, 6, 6, 6, 6, 5, 4, 1]),
        ("fast", 65, [6, 6, 6, 6, 6, 5, 4, 1]),
        ("fast", 66, [12, 10, 8, 6, 4, 3, 3, 3]),
        ("fast", 100, [12, 10, 8, 6, 4, 3, 3, 3]),
        ("slow", 50, [3, 3, 3, 3, 3, 2, 1, 1]),
    ],
)
def test_published_codebook_of_the_nearest_step_count(name, steps, rates):
    codebook = published_codebook(name, steps)
    changes = (0.02, 0.03, 0.05, 0.07, 0.0799 if steps < 66 else 0.09, 0.12, 0.2, 0.5)
    assert [codebook.rate(c) for c in changes] == rates


def test_unpublished_codebook_is_refused(sampler):
    with pytest.raises(ValueError, match="'slow' is not published for 100 steps.*'fast' for 30"):
        enable_cache(sampler.transformer, "Ada", codebook="slow", num_steps=80)
    enable_cache(sampler.transformer, "Ada", codebook="slow", scheduler=sampler.scheduler)
    with pytest.raises(ValueError, match="'slow' is not published for 100 steps"):
        sampler.run(100)
    sampler.run(12)
    assert cache_summary(sampler.transformer).num_steps == 12


def test_unknown_number_of_steps_is_refused(sampler):
    enable_cache(sampler.transformer, "Ada")
    with pytest.raises(ValueError, match="num_steps must be given for Ada"):
        sampler.run(12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codebook": "medium"}, ValueError, "codebook must be one of fast, slow"),
        ({"codebook": {}}, ValueError, "got no entry"),
        ({"codebook": {0.2: 2, 0.1: 1}}, ValueError, "got threshold 0.1 after 0.2"),
        ({"codebook": {0.0: 2}}, ValueError, "got threshold 0.0 after 0.0"),
        ({"codebook": {float("inf"): 2}}, ValueError, "got threshold inf"),
        ({"codebook": {0.1: 0}}, ValueError, "got rate 0"),
        ({"codebook": {0.1: 1.5}}, TypeError, "got rate 1.5"),
        ({"codebook": {"0.1": 1}}, TypeError, "got threshold '0.1'"),
        ({"codebook": 3}, TypeError, "codebook must be .*, got 3"),
        ({"codebook": "fast", "calibration": "x"}, ValueError, "give one of them"),
        ({"moreg": 1}, TypeError, "moreg must be True or False"),
        ({"moreg": "fast"}, ValueError, "moreg must be True, False or 'relative', got 'fast'"),
        ({"moreg": "relative", "moreg_divisor": 2}, ValueError, "moreg_divisor must be 1"),
        ({"moreg_divisor": 0.0}, ValueError, "moreg_divisor must be above 0"),
        ({"use_cache": "Fb", "codebook": "fast"}, ValueError, "codebook is an option of Ada"),
        ({"use_cache": "Fb", "moreg": True}, ValueError, "moreg is an option of Ada"),
        ({"use_cache": "Fb", "moreg": "relative"}, ValueError, "moreg is an option of Ada"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**{"use_cache": "Ada", **options})


def test_configuration_with_a_codebook_survives_a_round_trip_and_is_hashable():
    config = CacheConfig(use_cache="Ada", codebook={0.1: 3, 1.0: 1})
    assert config.codebook == ((0.1, 3), (1.0, 1))
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(CacheConfig(use_cache="Ada", codebook=[[0.1, 3], [1.0, 1]]))


def test_calibrated_codebook_is_bound_to_its_model(tmp_path, sampler):
    model, path = sampler.transformer, tmp_path / "adacache.json"
    codebook = Codebook.of({0.1: 4, 1e9: 3})
    for motion in (None, Profile(((0.2, 0.07), (0.9, 0.02)))):
        calibration = AdaCalibration(codebook, motion)
        save_ada_calibration(path, calibration, model, {"num_inference_steps": 30})
        assert load_ada_calibration(model, str(path)) == calibration
    with pytest.raises(ValueError, match="was made for another model"):
        load_ada_calibration(make_tiny_flux(seed=1), str(path))
    model.register_to_config(_name_or_path=str(tmp_path))
    for options, used in (({}, codebook), ({"codebook": "fast"}, None)):
        enable_cache(model, "Ada", num_steps=30, **options)
        assert engine_of(model).method.codebook == used
        disable_cache(model)


@pytest.mark.parametrize(
    "text",
    [
        "junk",
        "{}",
        '{"codebook": [[0.2, 1], [0.1, 1]]}',
        '{"codebook": [[0.2, 1]], "clip_motion": [[0.5, 0]]}',
    ],
)
def test_calibration_files_that_are_none_are_rejected(tmp_path, transformer, text):
    path = tmp_path / "junk.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not an AdaCache calibration"):
        load_ada_calibration(transformer, str(path))


def test_recorder_measures_the_changes_of_uncached_runs(sampler):
    rule, recorder = PublishedRule(EVERY_STEP), AdaRecorder()
    expected = euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    with recorder.attached(sampler.transformer, FLUX):
        for _ in range(2):
            assert torch.allclose(sampler.run(STEPS), expected, rtol=1e-5, atol=1e-5)
    assert recorder.changes == pytest.approx(2 * rule.changes[:-1], rel=1e-4)
    assert recorder.mean_motion() is None  # pictures
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
