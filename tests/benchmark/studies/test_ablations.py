"""The ablation study: exchanged parts, sweeps to equal compute, contributions, resuming."""

import json
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from benchmark.models.package import ErrorRule
from benchmark.run.generate import Generated
from benchmark.run.rows import cached_row, uncached_row
from benchmark.run.store import Store
from benchmark.score.pictures import psnr_db
from benchmark.studies import ablation_report, ablation_variants, ablations
from benchmark.studies.ablation_variants import (
    PARTS,
    VARIANTS,
    AlwaysLast,
    AnyGap,
    PartsOfAuto,
    UndampedSchedule,
    Variant,
    damped,
    last_value,
    undamped,
)
from tests.benchmark.tiny import run_study
from tests.samplers import Loop, linear_loop, relative_error
from tests.tiny import FluxSampler
from xfuser_adacorr import (
    AdaCorrection,
    CacheConfig,
    Schedule,
    cache_summary,
    disable_cache,
    enable_cache,
)

FRACTIONS = (0.25, 0.35)
NAMES = {variant.name: variant for variant in VARIANTS}


def test_every_part_compares_variants_of_the_study_that_differ_in_one_thing():
    assert len(NAMES) == len(VARIANTS)
    as_auto = {"forecast": "damped", "repairs": True, "rule": "ErrorRule"}
    as_even = {"forecast": "damped", "stand_in": None}
    for part in PARTS:
        present, absent = part.present, part.absent
        assert NAMES[present.name] is present and NAMES[absent.name] is absent
        a, b = present.config.to_dict(), absent.config.to_dict()
        plain = as_auto if a["use_cache"] == "Auto" else as_even
        a, b = plain | a, plain | b
        differing = {name for name in {*a, *b} if a.get(name) != b.get(name)}
        if {"use_cache", "schedule"} <= differing:  # Auto for Schedule: the rule that refreshes
            assert present.knob != absent.knob
        elif {"stand_in", "enable_adacorrection"} == differing:  # AdaCorrection forecasts too
            assert present.knob == absent.knob
        else:
            assert len(differing) + (present.knob != absent.knob) == 1


def refreshed(transformer):
    return [call.step_index for call in cache_summary(transformer).trace.calls if call.refreshed]


def run(loop, config):
    """Latents and refreshed steps of a run under a cache."""
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    x = loop.run(12)
    steps = refreshed(loop.transformer)
    disable_cache(loop.transformer)
    return x, steps


AUTO = CacheConfig.from_name("Auto", adacorr_tolerance=0.02)
JUDGED = (0, 2, 5, 8, 11)
"""A line follows the refresh that judges the first one."""


class Scope:
    """One process."""

    @staticmethod
    def summed(sums):
        return sums


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2-flow"])
def test_all_parts_as_they_are_make_auto(name):
    loop = linear_loop(name)
    expected, steps = run(loop, AUTO)
    x, found = run(loop, PartsOfAuto(tolerance=0.02))
    assert found == steps and len(steps) < 12
    assert torch.equal(x, expected)


class ListedRule(ErrorRule):
    """Refreshes at four steps, so that variants differ in what stands in alone."""

    def decide(self, call, read):
        decision = ErrorRule.decide(self, call, read)
        listed = call.step.index in (0, 4, 8, 11)
        return decision.turned(listed, "base" if listed else "reuse")


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2-flow"])
def test_without_compensation_the_forecast_alone_is_left(name):
    loop = linear_loop(name)
    corrected, _ = run(loop, PartsOfAuto(rule=ListedRule))
    uncompensated, _ = run(loop, PartsOfAuto(rule=ListedRule, repairs=False))
    options = {"schedule": (0, 4, 8, 11), "stand_in": "forecast"}
    forecast, _ = run(loop, CacheConfig.from_name("Schedule", **options))
    assert torch.equal(uncompensated, forecast)
    assert relative_error(corrected, forecast) > 1e-3


def test_the_last_value_is_repeated():
    """Against the sampling loop written out with every fourth velocity."""
    loop = linear_loop("flow-euler")
    x, _ = run(loop, PartsOfAuto(rule=ListedRule, repairs=False, forecast=last_value))
    scheduler, expected, kept = loop.scheduler, loop.flux.noise(), None
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        if i in (0, 4, 8, 11):
            kept = loop.flux.call(expected, t)
        expected = scheduler.step(kept, t, expected, return_dict=False)[0]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("forecast", [damped, undamped, last_value])
def test_forecasts_from_three_outputs(forecast):
    """After (t, v) = (1, 0), (0.9, 1), (0.8, 1.2): the line had 2, a change of 1, 0.2 happened."""
    made = forecast(Scope)
    for t, v in ((1.0, 0.0), (0.9, 1.0), (0.8, 1.2)):
        made.update(SimpleNamespace(coordinate=t), torch.tensor([v]))
    slope = {damped: 0.5 + 0.5 * 2 * 0.2, undamped: 1.0, last_value: 0.0}[forecast]
    expected = torch.tensor([1.2 + slope * 0.2])
    torch.testing.assert_close(made(SimpleNamespace(coordinate=0.7)), expected)


def test_the_undamped_schedule_counts_its_line_in_full():
    kinds = {"damped": Schedule, "undamped": UndampedSchedule}

    def ends(loop):
        made = {
            name: run(loop, kind(steps=JUDGED, correction=AdaCorrection()))
            for name, kind in kinds.items()
        }
        assert {tuple(steps) for _, steps in made.values()} == {JUDGED}
        return made["damped"][0], made["undamped"][0]

    assert relative_error(*ends(Loop(FluxSampler(None).scheduler))) > 1e-5
    assert relative_error(*ends(linear_loop("flow-euler"))) < 1e-4  # a line that holds


def test_the_last_call_is_refreshed_whatever_is_expected_of_it():
    loop = Loop(FluxSampler(None).scheduler)
    spared = run(loop, PartsOfAuto(tolerance=0.1))[1]
    assert spared[-1] < 11
    assert run(loop, PartsOfAuto(tolerance=0.1, rule=AlwaysLast))[1] == [*spared, 11]


def test_gaps_of_any_length():
    loop = Loop(FluxSampler(None).scheduler)
    # each gap is at least half as long again as the last one, in whole steps: 1, 2, 3, 5
    limited = run(loop, PartsOfAuto(tolerance=1e9, warmup=2))[1]
    assert limited == [0, 1, 3, 6, 11]
    assert run(loop, PartsOfAuto(tolerance=1e9, warmup=2, rule=AnyGap))[1] == [0, 1]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_kept_by_what_it_is_and_its_knob(variant):
    values = {"schedule": ((0, 3), (0, 4)), "target_compute": (0.3, 0.4)}
    a, b = (variant.at(v) for v in values.get(variant.knob, (0.01, 0.02)))
    rows = [cached_row("x", 12, config) for config in (a, b, NAMES["Auto"].at(0.01))]
    assert rows[0].key != rows[1].key
    assert (rows[0].key == rows[2].key) == (variant.name == "Auto")
    shown = json.loads(json.dumps(a.to_dict()))[variant.knob]
    assert shown == {"schedule": [0, 3], "target_compute": 0.3}.get(variant.knob, 0.01)


def test_counts_of_refreshes_enclose_the_fractions():
    assert ablations.refresh_counts(28, (0.25, 0.35)) == [7, 9, 10]  # 7 and 9.8
    assert ablations.refresh_counts(50, (0.25, 0.35)) == [12, 13, 17, 18]
    assert ablations.refresh_counts(4, (0.25,)) == [2]


@pytest.mark.parametrize(
    ("at_first", "expected"),
    [(0.3, [0.5, 1, 2]), (0.8, [1, 2, 4, 8, 16]), (0.1, [0.0625, 0.125, 0.25, 0.5, 1])],
)
def test_tolerances_are_doubled_and_halved_until_they_enclose_the_fractions(at_first, expected):
    first = ablations.FIRST_TOLERANCE

    def measure(tolerance):
        return at_first * (first / tolerance) ** 0.5

    found = ablations.sweep_tolerances(measure, (0.25, 0.35))
    assert [tolerance / first for tolerance in found] == pytest.approx(expected)


def test_tolerances_end_where_compute_does_not_follow():
    found = ablations.sweep_tolerances(lambda tolerance: 0.3, (0.25, 0.35))
    reach = ablations.TOLERANCE_RANGE
    assert found[-1] / found[0] == pytest.approx(reach * reach)


class Maker:
    """PSNR is 20 dB + 40 dB * compute, and 2 dB and 4 dB (two pictures) more with compensation."""

    def __init__(self):
        self.rows = []

    def __call__(self, row):
        self.rows.append(row)
        reference = torch.full((2, 3, 8, 8), 0.5)
        config = row.config
        if config is None:
            return Generated(reference)
        options = config.to_dict()
        if options["use_cache"] == "Schedule":
            compute = len(options["schedule"]) / row.num_inference_steps
        else:
            tolerance = options.get("adacorr_tolerance")
            compute = options.get("target_compute") or min(1.0, 0.02 / tolerance**0.5)
        gains = (
            (2.0, 4.0)
            if options["use_cache"] == "Auto" or options["enable_adacorrection"]
            else (0.0, 0.0)
        )
        errors = torch.tensor([10 ** -((20 + 40 * compute + gain) / 20) for gain in gains])
        summaries = [SimpleNamespace(compute_fraction=compute)] * 2
        return Generated(reference + errors[:, None, None, None], summaries)


def study(folder, make):
    return ablations.VariantSweeps(
        Store(folder), make, uncached=uncached_row(28), psnr=psnr_db, fractions=FRACTIONS
    )


def test_parts_are_compared_at_equal_compute(tmp_path):
    results = study(tmp_path, Maker()).results(VARIANTS)
    psnr = {(e["variant"], e["compute_fraction"]): e["psnr_db"] for e in results["variants"]}
    assert psnr["even, forecast", 0.35]["mean"] == pytest.approx(20 + 40 * 0.35, abs=1e-3)
    assert psnr["Auto", 0.25]["mean"] == pytest.approx(20 + 40 * 0.25 + 3, abs=1e-3)
    parts = {(e["part"], e["compute_fraction"]): e for e in results["parts"]}
    assert len(parts) == 2 * len(PARTS)
    for fraction in FRACTIONS:
        gained = parts["compensation (even steps)", fraction]
        assert gained["gain_db"] == pytest.approx(3.0, abs=1e-3)
        # deviation of (2, 4) over the root of two pictures
        assert gained["gain_error_db"] == pytest.approx(1.0, abs=1e-3)
        assert (gained["better"], gained["number"]) == (2, 2)
        same = parts["refresh rule for even steps", fraction]
        assert same["gain_db"] == pytest.approx(0.0, abs=1e-3)


def test_a_resumed_study_makes_nothing_again(tmp_path):
    results = study(tmp_path, Maker()).results(VARIANTS)
    make = Maker()
    assert study(tmp_path, make).results(VARIANTS) == results
    assert make.rows == []


def test_a_variant_that_does_not_reach_a_fraction_is_left_open(tmp_path):
    variant = Variant(name="Auto", config=CacheConfig.from_name("Auto"))
    result = study(tmp_path, Maker())
    result.make = lambda row: Generated(
        torch.zeros(2, 3, 8, 8), [SimpleNamespace(compute_fraction=0.3)] * 2
    )
    found = result.results([variant, ablation_variants.LAMBDA_0])
    assert [entry["psnr_db"] for entry in found["variants"]] == [None] * 4
    assert [(part["part"], part["gain_db"]) for part in found["parts"]] == [
        ("spatial term: lambda 1 for 0", None)
    ] * 2


def test_the_command_writes_results_and_report(models, tmp_path):
    out = tmp_path / "out"
    arguments = ["--num_inference_steps", "6", "--num_prompts", "2", "--threads", "1"]
    arguments += ["--model", models / "flux", "--judge", models / "judge"]
    arguments += ["--compute_fractions", "0.5"]
    arguments += ["--variants", "even, forecast", "even, AdaCorrection"]
    assert run_study("ablations", *arguments, "--output_dir", out) == 0
    document = json.loads((out / "results.json").read_text())
    assert document["settings"]["split"] == "development" and len(document["prompts"]) == 2
    assert list(document["sweeps"]) == ["even, forecast", "even, AdaCorrection"]
    rows = document["sweeps"]["even, AdaCorrection"]
    assert [fmean(row["compute_fraction"]) for row in rows] == [0.5]
    assert rows[0]["config"]["schedule"] == [0, 2, 5]
    report = (out / "report.md").read_text()
    assert "| even, forecast | 3 refreshes | 0.500 |" in report
    (line,) = (line for line in report.splitlines() if line.startswith("| compensation (even"))
    assert "(2 of 2)" in line or "(1 of 2)" in line or "(0 of 2)" in line
    assert run_study("ablations", *arguments, "--output_dir", out) == 2  # not empty


def test_the_report_names_what_is_switched_off_in_the_running_program(tmp_path):
    document = {
        "environment": {"torch": "2.13"},
        "settings": {
            "model": "m", "split": "development", "num_inference_steps": [28],
            "guidance_scale": 3.0, "dtype": "float32",
        },
        "prompts": [{}, {}],
        **study(tmp_path, Maker()).results(VARIANTS),
    }  # fmt: skip
    report = ablation_report.render(document)
    for text in (
        "| compensation (even steps) | +3.0 ± 1.0 (2 of 2) | +3.0 ± 1.0 (2 of 2) |",
        "| even, reuse | 30.0 ± 0.0 (min 30.0) | 34.0 ± 0.0 (min 34.0) |",
        "| even, reuse | 7 refreshes | 0.250 | 30.00 |",
        "no options of the package",
        "guidance 3",
    ):
        assert text in report


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--num_prompts", "0"), "--num_prompts"),
        (("--split", "x"), "--split"),
        (
            ("--compute_fractions", "0.5", "1.5"),
            "--compute_fractions must be between 0 and 1",
        ),
        (("--variants", "Auto", "x"), "--variants: unknown variant 'x'; accepted: even, reuse; "),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_mistakes_are_told_in_one_line(capfd, tmp_path, arguments, named):
    assert run_study("ablations", *arguments, "--output_dir", tmp_path / "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()
