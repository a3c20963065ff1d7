"""Forecasts: lines through computed outputs, and how far they are trusted."""

import math

import pytest
import torch

from xfuser_adacorr.model_executor.cache.forecasts import (
    FORECASTS,
    DampedLine,
    LastValue,
    Line,
    updated_damping,
)
from xfuser_adacorr.model_executor.cache.step import Step

every_forecast = pytest.mark.parametrize("make", FORECASTS.values(), ids=FORECASTS)


def at(coordinate):
    return Step(0, coordinate, coordinate - 0.1, 5)


def forecast_through(make, nodes):
    """A forecast that has seen outputs: (coordinate, value) after (coordinate, value)."""
    forecast = make()
    for coordinate, value in nodes:
        forecast.update(at(coordinate), torch.as_tensor(value))
    return forecast


def test_line_passes_through_both_refreshes():
    line = forecast_through(Line, [(0.9, 1.3), (0.8, 1.1)])
    assert float(line(at(0.8))) == pytest.approx(1.1)
    assert float(line(at(0.9))) == pytest.approx(1.3)
    assert float(line(at(0.5))) == pytest.approx(0.5)
    line.slope_kept = 0.25
    assert float(line(at(0.5))) == pytest.approx(1.1 - 0.25 * 0.6)


@every_forecast
def test_one_output_is_repeated_by_every_forecast(make):
    forecast = forecast_through(make, [(0.8, [1.0, 2.0])])
    stand_in = forecast(at(0.5))
    assert stand_in.tolist() == [1.0, 2.0]
    stand_in.zero_()  # others may write into it
    assert forecast.v0.tolist() == [1.0, 2.0]


def test_last_value_ignores_what_came_before():
    forecast = forecast_through(LastValue, [(0.9, 7.0), (0.8, 2.0)])
    assert float(forecast(at(0.1))) == 2.0


@every_forecast
def test_outputs_at_one_place_replace_each_other(make):
    """PNDM calls the model twice at a timestep: a line needs two places."""
    forecast = forecast_through(make, [(0.9, 5.0), (0.8, 2.0), (0.8, 3.0)])
    assert (float(forecast.v0), float(forecast.v1)) == (3.0, 5.0)
    assert (forecast.t0, forecast.t1) == (0.8, 0.9)
    assert math.isfinite(float(forecast(at(0.7))))


@every_forecast
def test_missed_is_measured_against_the_forecast(make):
    generator = torch.Generator().manual_seed(0)
    v1, v0, fresh = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    forecast = forecast_through(make, [(0.9, v1), (0.8, v0)])
    error, whole = (float(x) for x in forecast.missed(at(0.6), fresh))
    line = v0 if make is LastValue else v0 + 2.0 * (v0 - v1)
    assert error == pytest.approx(float((fresh - line).square().sum()))
    assert whole == pytest.approx(float(fresh.square().sum()))


@every_forecast
def test_nothing_is_missed_before_anything_was_forecast(make):
    forecast = make()
    error, whole = (float(x) for x in forecast.missed(at(1.0), torch.ones(3)))
    assert math.isnan(error) and whole == 3.0


def test_missed_is_of_the_part_that_the_sampler_follows():
    forecast = forecast_through(Line, [(0.9, [1.0, 100.0]), (0.8, [1.0, 0.0])])
    forecast.view = lambda output: output[:1]
    error, whole = (float(x) for x in forecast.missed(at(0.7), torch.tensor([2.0, 9.0])))
    assert (error, whole) == (1.0, 4.0)


def line_sums(predicted, happened):
    return torch.stack([(happened * predicted).sum(), predicted.square().sum()])


@pytest.mark.parametrize(
    ("happened", "share"), [(1.0, 1.0), (3.0, 1.0), (0.5, 1.0), (0.2, 0.4), (0.0, 0.0), (-1.0, 0.0)]
)
def test_damping_is_the_share_of_the_slope_that_holds(happened, share):
    """At half of the change the line errs as much as the last value: it still counts in full."""
    predicted = torch.tensor([3.0, 4.0])
    aside = torch.tensor([4.0, -3.0])  # says nothing about the slope
    damping = updated_damping(0.8, line_sums(predicted, happened * predicted + aside))
    assert float(damping) == pytest.approx(0.4 + 0.5 * share)


def test_a_line_that_predicts_no_change_is_not_damped():
    assert float(updated_damping(1.0, line_sums(torch.zeros(3), torch.ones(3)))) == 1.0


def test_a_damped_line_learns_at_every_refresh():
    """Values on a bend, by hand: 0, 1, 1.2 at equal distances; 0.2 of 1 held."""
    forecast = forecast_through(DampedLine, [(0.9, [0.0]), (0.8, [1.0]), (0.7, [1.2])])
    assert float(forecast.slope_kept) == pytest.approx(0.5 + 0.5 * 0.4)
    assert float(forecast(at(0.6))) == pytest.approx(1.2 + 0.7 * 0.2)
    undamped = forecast_through(Line, [(0.9, [0.0]), (0.8, [1.0]), (0.7, [1.2])])
    assert float(undamped(at(0.6))) == pytest.approx(1.4)


def test_sums_of_a_damped_line_are_added_up_over_the_ranks():
    """Two halves of an output, each with the sums of both, learn what the whole one does."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 10, generator=generator)
    whole = DampedLine()
    kept = []
    for coordinate, output in zip((0.9, 0.8, 0.6, 0.5), outputs, strict=True):
        whole.update(at(coordinate), output)
        kept.append(float(whole.slope_kept))

    sums = []
    for half in (slice(0, 4), slice(4, 10)):
        seen = []
        line = DampedLine(lambda x, seen=seen: seen.append(x) or x)
        for coordinate, output in zip((0.9, 0.8, 0.6, 0.5), outputs, strict=True):
            line.update(at(coordinate), output[half])
        sums.append(seen)
    totals = [a + b for a, b in zip(*sums, strict=True)]
    damping = 1.0
    for total in totals:
        damping = updated_damping(damping, total)
    assert float(damping) == pytest.approx(kept[-1], rel=1e-5)


def test_a_forecast_is_lost_where_three_refreshes_in_a_row_missed_by_the_output_itself():
    """By hand: forecasts of 1, -3, 7 and 2.5 for outputs -1, 2, 1.5 and 2.5."""
    forecast, found = DampedLine(), []
    for coordinate, output in ((0.9, 1.0), (0.8, -1.0), (0.7, 2.0), (0.6, 1.5), (0.5, 2.5)):
        if coordinate == 0.6:
            forecast.slope_kept = 5 / 3
        if coordinate == 0.5:
            forecast.slope_kept = -2.0
        forecast.missed(at(coordinate), torch.tensor([output]))
        found.append(None if forecast.lost is None else bool(forecast.lost))
        forecast.update(at(coordinate), torch.tensor([output]))
    assert found == [None, False, False, True, False]


def test_one_message_a_refresh_tells_what_was_missed_and_how_the_slope_held():
    messages = []
    asked, alone = DampedLine(lambda sums: messages.append(len(sums)) or sums), DampedLine()
    for coordinate, output in ((0.9, 0.0), (0.8, 1.0), (0.7, 1.2), (0.6, 2.0)):
        asked.missed(at(coordinate), torch.tensor([output]))
        for line in (asked, alone):
            line.update(at(coordinate), torch.tensor([output]))
        assert float(asked.slope_kept) == float(alone.slope_kept)
    assert messages == [2, 4, 4]


@pytest.mark.parametrize(("share", "lost"), [(0.7, False), (0.9, True)])
def test_misses_count_from_four_fifths_of_the_output_on(share, lost):
    """The last value stands in for outputs that each are smaller by this share of themselves."""
    forecast, output = DampedLine(), 1.0
    for coordinate in (0.9, 0.8, 0.7, 0.6):
        forecast.slope_kept = 0.0
        forecast.missed(at(coordinate), torch.tensor([output]))
        forecast.update(at(coordinate), torch.tensor([output]))
        output /= 1.0 + share
    assert bool(forecast.lost) is lost


def test_two_misses_are_not_lost():
    forecast = DampedLine()
    for coordinate, output in ((0.9, 1.0), (0.8, 1.0), (0.7, -1.0), (0.6, 9.0), (0.5, 19.0)):
        forecast.missed(at(coordinate), torch.tensor([output]))
        assert forecast.lost is None or not forecast.lost
        forecast.update(at(coordinate), torch.tensor([output]))


@pytest.mark.parametrize(("elsewhere", "lost"), [([0.0, 9.0], False), ([90.0, 9.0], True)])
def test_what_is_lost_is_told_by_all_ranks_together(elsewhere, lost):
    """This half of the output misses by twice its size; the other's error and size are added."""
    line = DampedLine(lambda sums: sums + torch.tensor([*elsewhere, 0.0, 0.0])[: len(sums)])
    line.slope_kept = 0.0
    for coordinate, output in ((0.9, 1.0), (0.8, -1.0), (0.7, 1.0), (0.6, -1.0)):
        line.missed(at(coordinate), torch.tensor([output]))
        line.v1, line.t1 = line.v0, line.t0
        line.v0, line.t0 = torch.tensor([output]), coordinate
    assert bool(line.lost) is lost


def test_learning_reads_nothing_from_the_device(host_reads):
    forecast = DampedLine()
    for coordinate in (0.9, 0.8, 0.6):
        forecast.missed(at(coordinate), torch.ones(3))
        forecast.update(at(coordinate), torch.ones(3))
    forecast(at(0.5))
    assert not host_reads
