"""The ablation study: switches, sweeps to equal compute, contributions, resuming, the command."""

import json
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from xfuser_adacorr.core.blend import curvature_node

from benchmark.run.generate import Generated
from benchmark.run.rows import uncached_row
from benchmark.run.store import Store
from benchmark.score.pictures import psnr_db
from benchmark.studies import ablation_report, ablation_variants, ablations
from benchmark.studies.ablation_variants import PARTS, VARIANTS, Variant
from tests.benchmark.tiny import run_study
from tests.samplers import Loop, linear_loop, relative_error
from tests.tiny import FluxSampler
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache

FRACTIONS = (0.25, 0.35)
NAMES = {variant.name: variant for variant in VARIANTS}


def test_every_part_compares_variants_of_the_study_that_differ_in_one_thing():
    assert len(NAMES) == len(VARIANTS)
    for part in PARTS:
        present, absent = part.present, part.absent
        assert NAMES[present.name] is present and NAMES[absent.name] is absent
        a, b = present.config.to_dict(), absent.config.to_dict()
        differing = {name for name in {*a, *b} if a.get(name) != b.get(name)}
        changes = [present.switch is not absent.switch, present.knob != absent.knob]
        if {"use_cache", "schedule"} <= differing:  # Auto for Schedule: the rule that refreshes
            assert changes == [False, True]
        elif {"stand_in", "enable_adacorrection"} == differing:  # AdaCorrection forecasts too
            assert changes == [False, False]
        else:
            assert len(differing) + sum(changes) == 1


def refreshed(transformer):
    return [call.step_index for call in cache_summary(transformer).trace.calls if call.refreshed]


def run(loop, config, switch=None):
    """Latents and refreshed steps of a run under a cache."""
    with (switch or ablation_variants.nullcontext)():
        enable_cache(loop.transformer, config, scheduler=loop.scheduler)
        x = loop.run(12)
        steps = refreshed(loop.transformer)
        disable_cache(loop.transformer)
    return x, steps


EVEN = CacheConfig.from_name("Schedule+AdaCorrection", schedule=(0, 4, 8, 11))
FORECAST = CacheConfig.from_name("Schedule", schedule=(0, 4, 8, 11), stand_in="forecast")
JUDGED = CacheConfig.from_name("Schedule", schedule=(0, 2, 5, 8, 11), stand_in="forecast")
"""A line follows the refresh that judges the first one."""


@pytest.mark.parametrize("name", ["flow-euler", "dpm-2-flow"])
def test_without_compensation_the_forecast_alone_is_left(name):
    loop = linear_loop(name)
    corrected, _ = run(loop, EVEN)
    switched, _ = run(loop, EVEN, ablation_variants.without_compensation)
    forecast, _ = run(loop, FORECAST)
    assert torch.equal(switched, forecast)
    assert relative_error(corrected, forecast) > 1e-3
    assert torch.equal(run(loop, EVEN)[0], corrected)  # the switch is back


def test_without_line_the_last_output_is_repeated():
    """Against the sampling loop written out with every fourth velocity."""
    loop = linear_loop("flow-euler")
    x, _ = run(loop, FORECAST, ablation_variants.without_line)
    scheduler, expected, kept = loop.scheduler, loop.flux.noise(), None
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        if i in (0, 4, 8, 11):
            kept = loop.flux.call(expected, t)
        expected = scheduler.step(kept, t, expected, return_dict=False)[0]
    torch.testing.assert_close(x, expected)


def test_without_damping_the_line_counts_in_full():
    loop = Loop(FluxSampler(None).scheduler)
    damped, _ = run(loop, JUDGED)
    undamped, _ = run(loop, JUDGED, ablation_variants.without_damping)
    assert relative_error(damped, undamped) > 1e-3
    assert torch.equal(run(loop, JUDGED)[0], damped)
    loop = linear_loop("flow-euler")  # outputs on a line are not damped
    damped, _ = run(loop, JUDGED)
    assert relative_error(damped, run(loop, JUDGED, ablation_variants.without_damping)[0]) < 1e-4


def test_without_curvature_the_blend_has_two_nodes():
    assert curvature_node(0.4, 0.6, 0.8) == 0.8
    with ablation_variants.without_curvature():
        assert curvature_node(0.4, 0.6, 0.8) is None
    assert curvature_node(0.4, 0.6, 0.8) == 0.8


def test_the_last_call_is_refreshed_by_the_switch_whatever_is_expected_of_it():
    loop = Loop(FluxSampler(None).scheduler)
    config = CacheConfig.from_name("Auto", adacorr_tolerance=0.1)
    spared = run(loop, config)[1]
    assert spared[-1] < 11
    assert run(loop, config, ablation_variants.with_last_refreshed)[1] == [*spared, 11]
    assert run(loop, config)[1] == spared


def test_gaps_of_any_length_by_the_switch():
    loop = Loop(FluxSampler(None).scheduler)
    config = CacheConfig.from_name("Auto", adacorr_tolerance=1e9, warmup_steps=2)
    limited = run(loop, config)[1]
    assert limited == [0, 1, 3, 6, 11]
    assert run(loop, config, ablation_variants.with_any_gap)[1] == [0, 1]
    assert run(loop, config)[1] == limited


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
            tolerance = options["adacorr_tolerance"]
            compute = options.get("target_compute") or min(1.0, 0.02 / tolerance**0.5)
        gains = (2.0, 4.0) if options["enable_adacorrection"] else (0.0, 0.0)
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
