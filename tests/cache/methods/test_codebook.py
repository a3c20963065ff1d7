"""Codebooks of AdaCache: published, and given."""

import numpy as np
import pytest

from xfuser_adacorr import CacheConfig, cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.methods.codebook import Codebook, published_codebook


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
        ({"moreg": "fast"}, TypeError, "moreg must be True or False, got 'fast'"),
        ({"moreg_divisor": 2}, ValueError, "moreg_divisor is for moreg=True"),
        ({"moreg_divisor": 0.0}, ValueError, "moreg_divisor must be finite and above 0"),
        ({"use_cache": "Fb", "codebook": "fast"}, ValueError, "codebook is an option of Ada"),
        ({"use_cache": "Fb", "moreg": True}, ValueError, "moreg is an option of Ada"),
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
