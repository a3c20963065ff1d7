"""The search for a schedule: the optimum of a known score, and going on where it stopped."""

import json
from itertools import combinations, pairwise

import pytest

from xfuser_adacorr.model_executor.cache.calibration.search import (
    even_starts,
    moves,
    search_schedule,
)
from xfuser_adacorr.model_executor.cache.refreshes import evenly_spaced

STEPS, BUDGET = 14, 5


def gap_cost(rates):
    """Score: minus the squared rates added up over every gap, as errors between refreshes do."""

    def score(steps):
        ends = [*steps, STEPS]
        return -sum(sum(rates[a + 1 : b]) ** 2 for a, b in pairwise(ends))

    return score


PROFILES = {
    "even": [1.0] * STEPS,
    "early": [3.0 * 0.75**i for i in range(STEPS)],
    "late": [0.1 * 1.4**i for i in range(STEPS)],
    "middle": [1.0 / (1.0 + (i - 6) ** 2) for i in range(STEPS)],
}


def best_of_all(score):
    return max(((0, *rest) for rest in combinations(range(1, STEPS), BUDGET - 1)), key=score)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("seed", [0, 1])
def test_search_finds_the_optimum(profile, seed):
    score = gap_cost(PROFILES[profile])
    starts = [evenly_spaced(list(range(STEPS)), BUDGET), (0, 1, 2, 3, 4)]
    found = search_schedule(score, starts, STEPS, seed=seed)
    assert found.complete and found.steps[0] == 0 and len(found.steps) == BUDGET
    assert found.score == pytest.approx(score(best_of_all(score)))
    assert found.evaluations < 400  # of the 715 sets there are


def test_interrupted_search_goes_on_identically():
    score, starts = gap_cost(PROFILES["early"]), [evenly_spaced(list(range(STEPS)), BUDGET)]
    order = []
    whole = search_schedule(score, starts, STEPS, seed=3, scored=lambda s, v: order.append(s))
    for stop in (1, 7, len(order) - 1):
        kept, after = {}, []

        def until(steps, stop=stop, kept=kept):
            if len(kept) == stop:
                raise KeyboardInterrupt
            return score(steps)

        with pytest.raises(KeyboardInterrupt):
            search_schedule(until, starts, STEPS, seed=3, scored=kept.__setitem__)
        resumed = search_schedule(
            score, starts, STEPS, seed=3, known=kept, scored=lambda s, v, a=after: a.append(s)
        )
        assert resumed == whole
        assert [*kept, *after] == order, "the same sets in the same order, none twice"


def test_evaluations_are_limited_and_the_best_so_far_is_returned():
    seen = {}
    score, starts = gap_cost(PROFILES["late"]), [(0, 1, 2, 3, 4)]
    found = search_schedule(
        score, starts, STEPS, max_evaluations=9, scored=lambda s, v: seen.update({s: v})
    )
    assert (found.evaluations, found.complete) == (9, False)
    assert found.score == max(seen.values()) == seen[found.steps]


def test_moves_keep_step_0_and_the_number_of_refreshes():
    proposed = list(moves((0, 4, 8), 4, 12))
    assert proposed[:2] == [(0, 3, 8), (0, 5, 8)]
    assert (0, 8, 10) in proposed  # the middle of the last gap
    assert all(len(set(s)) == 3 and s[0] == 0 and s[-1] < 12 for s in proposed)
    assert {(0, 5, 9), (0, 3, 7)} <= set(proposed)  # together with the one after it


@pytest.mark.parametrize("start", [(), (1, 2), (0, 2, 2), (0, 14), (0, 3, 2)])
def test_bad_starts_are_refused(start):
    with pytest.raises(ValueError, match="starts must be rising, begin at step 0, end before 14"):
        search_schedule(lambda steps: 0.0, [start], STEPS)


def test_scores_survive_json():
    """What a checkpoint holds leads to the same result: floats are written exactly."""
    score, starts = gap_cost(PROFILES["middle"]), [(0, 3, 6, 9, 12)]
    kept = {}
    whole = search_schedule(score, starts, STEPS, scored=kept.__setitem__)
    read = json.loads(json.dumps([[list(steps), value] for steps, value in kept.items()]))
    known = {tuple(steps): value for steps, value in read}
    assert search_schedule(None, starts, STEPS, known=known) == whole


def test_even_starts_have_the_last_step_and_spare_it():
    log_snrs = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 40.0]
    assert even_starts(log_snrs, 3) == {
        "even": (0, 4, 8),
        "even in log-SNR": (0, 7, 8),
        "even, last step spared": (0, 3, 5),
        "even in log-SNR, last step spared": (0, 6, 7),
    }
    assert set(even_starts(log_snrs, 9).values()) == {tuple(range(9))}


def test_the_best_start_is_climbed_from_first():
    score = gap_cost(PROFILES["even"])
    starts = [(0, 1, 2, 3, 4), (0, 2, 4, 8, 11)]
    asked = []
    search_schedule(
        score, starts, STEPS, max_evaluations=3, scored=lambda steps, value: asked.append(steps)
    )
    assert asked[:2] == starts and asked[2] in {
        near for step in starts[1][1:] for near in moves(starts[1], step, STEPS)
    }
