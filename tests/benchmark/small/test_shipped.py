"""The shipped small pipelines beside FLUX's: what they draw, and that caches pay on them."""

import json
import re
from pathlib import Path

import pytest

from benchmark.models.families import FAMILIES
from benchmark.small.evaluation import split_accuracy
from benchmark.small.families import small_family
from benchmark.small.judge import load_judge
from benchmark.small.splits import read_entries
from xfuser_adacorr import (
    Auto,
    CacheConfig,
    Schedule,
    cache_summary,
    disable_cache,
    enable_cache,
)

PIPELINES = Path(__file__).parents[3] / "benchmark" / "pipelines"
DEVELOPED_ON = ("dit", "pixart", "opensora")
TEST_FAMILIES = ("sd", "sd3")
LEAST_ATTRIBUTES = {"dit": 0.95, "pixart": 0.95, "opensora": 0.6, "sd": 0.95, "sd3": 0.95}
"""Share of what was asked for that is drawn; the cards say what was measured."""


def load(name):
    pipe = FAMILIES[name].load_class().from_pretrained(PIPELINES / name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return small_family(name), pipe


@pytest.fixture(scope="module", params=[*DEVELOPED_ON, *TEST_FAMILIES])
def shipped(request):
    return load(request.param)


@pytest.fixture(scope="module", params=DEVELOPED_ON)
def developed_on(request):
    return load(request.param)


@pytest.fixture(scope="module", params=TEST_FAMILIES)
def unseen_family(request):
    return load(request.param)


def draw(family, pipe, steps, number, guidance_scale=3.0):
    entries = read_entries(family.name, "development", number)
    return family.generate(pipe, entries.texts, entries.seeds, steps, guidance_scale)


def test_pictures_show_what_was_asked_for(shipped):
    family, pipe = shipped
    benchmarked = FAMILIES[family.name]
    judge = load_judge(PIPELINES / benchmarked.judge, benchmarked.judging().judge_class)
    steps, number = (10, 4) if family.clips else (20, 8)
    found = split_accuracy(family, pipe, judge, "test", steps, number=number, guidance_scale=3.0)
    assert found["attributes"] > LEAST_ATTRIBUTES[family.name]


def test_the_transformer_predicts_a_variance_too_as_the_published_ones_do(developed_on):
    _, pipe = developed_on
    config, latents = pipe.transformer.config, pipe.vae.config.latent_channels
    assert config.in_channels == latents
    if "pred_sigma" in config:
        assert config.pred_sigma
    else:
        assert config.out_channels == 2 * latents
        assert pipe.scheduler.config.prediction_type == "epsilon"


def test_the_card_quotes_the_training_record(shipped):
    family, pipe = shipped
    record = (PIPELINES / family.name / "TRAINING.md").read_text()
    card = (PIPELINES / family.name / "README.md").read_text()
    row = re.search(r"^\| test \| (?:28|30) \| 3 \|.*$", record, re.MULTILINE)[0]
    for value in row.strip("| ").split(" | ")[-2:]:
        assert value in card
    index = json.loads((PIPELINES / family.name / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__


def test_correction_keeps_the_picture_where_reuse_loses_it(developed_on):
    """At about half of the compute; a loose bound on what the sweeps measure."""
    family, pipe = developed_on
    steps = 20 if family.clips else 28
    full = draw(family, pipe, steps, 1)
    errors = {}
    for config in (
        CacheConfig.from_name("Fb", rel_l1_thresh=0.2),
        CacheConfig.from_name("Fb+AdaCorrection", adacorr_tolerance=0.01),
        CacheConfig.from_name("Auto", adacorr_tolerance=0.01),
    ):
        enable_cache(pipe, config)
        try:
            errors[config.name] = (draw(family, pipe, steps, 1) - full).square().mean().item()
            assert 0.2 < cache_summary(pipe).compute_fraction < 0.75
        finally:
            disable_cache(pipe)
    plain, *corrected = errors.values()
    assert max(corrected) < plain / 4


def test_a_test_family_keeps_its_pictures_where_half_of_the_steps_are_skipped(unseen_family):
    """By the rule alone; a loose bound on what the sweeps measure."""
    family, pipe = unseen_family
    steps = FAMILIES[family.name].steps
    full, errors = draw(family, pipe, steps, 2), {}
    reuse = Schedule(steps=range(0, steps, 2), forecast="last")
    for method in (reuse, Auto(target_compute=0.5, use_plan=False)):
        enable_cache(pipe, method)
        try:
            errors[type(method)] = (draw(family, pipe, steps, 2) - full).square().mean().item()
            assert cache_summary(pipe).computed_steps == steps // 2
        finally:
            disable_cache(pipe)
    assert errors[Auto] < errors[Schedule] / 4
