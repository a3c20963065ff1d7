"""The soak finds what it is to find: growth, and generations that differ from fresh ones."""

import random
from dataclasses import replace

import pytest
import torch

from benchmark.studies import soak
from benchmark.studies.soak_report import AVERAGED, WARMUP, Counts, counted, grown, growth, render


def test_growth_is_from_after_the_warm_up_to_the_end():
    warm = [1000] * WARMUP
    settled = [100] * AVERAGED + [104] * 2 * WARMUP + [110] * AVERAGED
    assert growth([10] * WARMUP + settled) == pytest.approx(0.1)
    assert growth(warm + [100] * 2 * WARMUP) == 0.0
    assert growth([1, 2, 3]) == 0.0, "too few to tell"


def test_each_tensor_that_stays_counts_and_a_first_hook():
    warm = Counts(100, 200, 6, 2, 0)
    shares = grown(warm, Counts(500, 203, 6, 2, 1), [100] * 60)
    assert shares == {
        "rss_bytes": 0.0,
        "tensors": pytest.approx(0.015),
        "files": 0.0,
        "threads": 0.0,
        "hooks": 1.0,
    }


def test_tensors_and_hooks_that_stay_are_counted():
    model = torch.nn.Linear(2, 2)
    before = counted([model])
    kept = [torch.zeros(1) for _ in range(3)]
    handle = model.register_forward_hook(lambda *args: None)
    after = counted([model])
    assert after.tensors - before.tensors >= len(kept) and after.hooks == before.hooks + 1
    handle.remove()


@pytest.fixture(scope="module")
def families():
    return {"dit": soak.load("dit")}


def test_a_short_soak_has_no_failures(families):
    found = soak.soak(families, generations=4, minutes=None, seed=2)
    assert found["generations"] == 4 and found["failures"] == []
    assert sum(found["events"].values()) == 4
    report = render({**found, "families": ["dit"], "environment": {"python": "3"}})
    assert "4 generations in one process" in report and "None." in report


def test_what_is_held_when_put_down_does_not_depend_on_the_draws(families):
    model = families["dit"].pipe.transformer
    held = []
    for seed in (3, 4, 5):
        soak.soak(families, generations=2, minutes=None, seed=seed)
        held.append(counted([model]))
    assert held[1].tensors == held[2].tensors and held[1].hooks == held[2].hooks == 0
    assert families["dit"].method is None, "the cache is off"


def test_a_generation_that_differs_is_told(families, monkeypatch):
    monkeypatch.setattr(soak, "EVENTS", ("none",))
    draw = soak.drawn(random.Random(0), families)
    monkeypatch.setattr(soak, "fresh", lambda kept, draw: (torch.zeros(()), 0))
    event, wrong = soak.play(families["dit"], draw)
    assert event == "none" and "differs from a fresh run" in wrong


@pytest.mark.parametrize("event", ["exception", "interrupt", "reset"])
def test_what_is_to_happen_happens(families, monkeypatch, event):
    monkeypatch.setattr(soak, "EVENTS", (event,))
    draw = soak.drawn(random.Random(1), families)
    draw = replace(draw, at=1)
    assert soak.play(families["dit"], draw) == (event, None)
