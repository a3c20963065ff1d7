"""Rows of a run: options, same-compute rows, sweeps and their interpolation."""

import pytest

from benchmark.models.families import DDIM, DPM_SOLVER, EULER, FAMILIES
from benchmark.models.names import LEARNED, LEARNING, METHOD_NAMES, UNCACHED
from benchmark.models.package import Course, Plan, PlanFile
from benchmark.run import rows as plan
from benchmark.run import sweep
from benchmark.run.sweep import SWEEPS
from benchmark.score import curves
from benchmark.settings import ROOT
from xfuser_adacorr import (
    METHODS,
    AdaCorrection,
    Auto,
    CacheConfig,
    Fast,
    Literal,
    load_family_config,
)

DOCUMENTED = {
    "Fb": CacheConfig.from_name("Fb", rel_l1_thresh=0.12),
    "Tea+AdaCorrection": CacheConfig.from_name(
        "Tea+AdaCorrection", rel_l1_thresh=0.3, adacorr_tolerance=0.05
    ),
    "Auto": CacheConfig.from_name("Auto", adacorr_tolerance=0.008),
}


def option(config, name):
    return config.to_dict().get(name)


def test_a_method_takes_the_options_of_the_file():
    assert plan.method_config("Fb", DOCUMENTED, {}) == DOCUMENTED["Fb"]


def test_a_corrected_method_that_is_not_in_the_file_takes_all_but_its_base_methods_threshold():
    documented = {"Fb": CacheConfig.from_name("Fb", rel_l1_thresh=0.12, warmup_steps=3)}
    config = plan.method_config("Fb+AdaCorrection", documented, {})
    assert (config.name, option(config, "warmup_steps")) == ("Fb+AdaCorrection", 3)
    assert option(config, "rel_l1_thresh") is None
    config = plan.method_config("Fb+AdaCorrection", documented, {"rel_l1_thresh": 0.2})
    assert option(config, "rel_l1_thresh") == 0.2


def test_explicit_options_win_over_the_file():
    options = {"rel_l1_thresh": 0.2, "adacorr_gamma": 2.0}
    config = plan.method_config("Tea+AdaCorrection", DOCUMENTED, options)
    assert option(config, "rel_l1_thresh") == 0.2 and option(config, "adacorr_gamma") == 2.0
    assert option(config, "adacorr_tolerance") == 0.05


def test_a_target_takes_the_place_of_the_documented_tolerance():
    for name in ("Auto", "Tea+AdaCorrection"):
        config = plan.method_config(name, DOCUMENTED, {"target_compute": 0.4})
        assert option(config, "target_compute") == 0.4
        assert option(config, "adacorr_tolerance") is None
    assert plan.method_config("Fb", DOCUMENTED, {"target_compute": 0.4}) == DOCUMENTED["Fb"]


def test_options_go_only_to_the_methods_that_have_them():
    options = {"rel_l1_thresh": 0.2, "adacorr_tolerance": 0.01}
    fb, auto = (plan.method_config(name, DOCUMENTED, options) for name in ("Fb", "Auto"))
    assert option(fb, "adacorr_tolerance") is None and option(fb, "rel_l1_thresh") == 0.2
    assert option(auto, "rel_l1_thresh") is None and option(auto, "adacorr_tolerance") == 0.01


def test_the_published_commands_options_go_to_the_corrected_method_alone():
    options = {"adacorr_gamma": 0.5, "adacorr_lambda": 2.0}
    names = (UNCACHED, "Fast", "Fast+AdaCorrection")
    uncached, fast, corrected = plan.comparison_rows(names, [30], {}, options)
    assert uncached.config is None and fast.config == Fast()
    assert corrected.config == Fast(correction=AdaCorrection(gamma=0.5, lambda_=2.0))
    plan.check_options_act(names, options)


def test_literal_correction_has_no_tolerance_and_auto_is_left_as_it_is():
    options = {"adacorr_mode": "literal", "adacorr_tolerance": 0.02}
    config = plan.method_config("Tea+AdaCorrection", DOCUMENTED, options)
    assert config.correction == Literal() and config.threshold == 0.3
    assert plan.method_config("Auto", DOCUMENTED, options) == Auto(tolerance=0.02)
    assert plan.method_config("Fb", DOCUMENTED, options) == DOCUMENTED["Fb"]
    with pytest.raises(ValueError, match="--adacorr_tolerance: none of Tea.* has it"):
        plan.check_options_act(["Tea+AdaCorrection"], options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"adacorr_gamma": 2.0}, ["None", "Fb"]),
        ({"rel_l1_thresh": 0.1}, ["None", "Auto", "Schedule"]),
        ({"stand_in": "forecast"}, ["Schedule+AdaCorrection", "Fb"]),
        ({"adacorr_mode": "literal"}, ["Auto", "Fb"]),
        ({"adacorr_gamma": 2.0}, ["diffusers:TaylorSeer"]),
    ],
)
def test_an_option_that_no_listed_method_has_is_an_error(options, names):
    (option,) = options
    with pytest.raises(
        ValueError, match=f"--{option}: none of {', '.join(names)}".replace("+", ".")
    ):
        plan.check_options_act(names, options)


def test_every_step_count_has_an_uncached_row_first():
    rows = plan.comparison_rows([UNCACHED, "Fb"], [28, 50], DOCUMENTED, {})
    assert [(row.name, row.num_inference_steps) for row in rows] == [
        (UNCACHED, 28), ("Fb", 28), (UNCACHED, 50), ("Fb", 50),
    ]  # fmt: skip


def test_same_compute_rows_are_the_nearest_step_counts_without_repetitions():
    rows = plan.comparison_rows(["Fb", "Tea", "Auto"], [50], DOCUMENTED, {})
    fractions = dict(zip((row.key for row in rows), (1.0, 0.352, 0.348, 0.251), strict=True))
    fewer = plan.same_compute_rows(rows, fractions)
    assert [(row.solver, row.num_inference_steps) for row in fewer] == [
        (EULER, 13), (EULER, 17), (EULER, 18), (DPM_SOLVER, 13), (DPM_SOLVER, 17), (DPM_SOLVER, 18),
    ]  # fmt: skip


def test_a_method_that_never_hits_has_no_same_compute_rows():
    rows = plan.comparison_rows(["Fb"], [50], DOCUMENTED, {})
    assert plan.same_compute_rows(rows, {row.key: 1.0 for row in rows}) == []


def test_keys_tell_rows_with_different_options_apart():
    rows = sweep.sweep_rows(METHOD_NAMES, [28, 50], DOCUMENTED, {})
    assert len({row.key for row in rows}) == len(rows)


def test_a_sweep_covers_every_method_and_both_solvers_at_any_step_count():
    rows = sweep.sweep_rows(METHOD_NAMES, [30], DOCUMENTED, {})
    names = {row.name for row in rows}
    assert names == {*METHOD_NAMES, "Euler, fewer steps", "DPM-Solver++, fewer steps"}
    steps = [row.num_inference_steps for row in rows if row.solver == DPM_SOLVER]
    assert min(steps) <= 0.25 * 30 and max(steps) >= 0.5 * 30


def test_a_sweep_varies_the_listed_knob_alone():
    lists = {28: {"Fb": [{"rel_l1_thresh": 0.1}, {"rel_l1_thresh": 0.2}]}}
    rows = sweep.sweep_rows(["Fb"], [28], DOCUMENTED, {}, sweeps=lists)
    assert [option(row.config, "rel_l1_thresh") for row in rows if row.config] == [0.1, 0.2]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_of_ada_names_the_published_codebook(name):
    """Whatever is stored beside the model."""
    methods = ["Ada", "Ada+AdaCorrection", "Fb+AdaCorrection"]
    for steps in SWEEPS[name]:
        rows = sweep.sweep_rows(methods, [steps], DOCUMENTED, {}, sweeps=SWEEPS[name])
        configs = [row.config for row in rows if row.config is not None]
        assert {option(c, "codebook") for c in configs if c.name.startswith("Ada")} == {"fast"}
        assert {option(c, "codebook") for c in configs if c.name.startswith("Fb")} == {None}


def test_the_study_covers_gamma_and_lambda_of_the_corrected_methods():
    rows = plan.gamma_lambda_rows(["Fb", "Tea+AdaCorrection"], [28], DOCUMENTED, {})
    assert {row.name for row in rows} == {UNCACHED, "Tea+AdaCorrection"}
    configs = [row.config for row in rows if row.config]
    pairs = {(c.correction.gamma, c.correction.lambda_) for c in configs}
    assert pairs == {(g, k) for g in (0.5, 1, 2) for k in (0.5, 1, 2)}


def test_the_study_of_no_corrected_method_is_of_auto():
    rows = plan.gamma_lambda_rows(["Fb"], [28], DOCUMENTED, {})
    assert {row.name for row in rows} == {UNCACHED, "Auto"}


@pytest.mark.parametrize(
    ("at", "expected"), [(0.25, 11.0), (0.2, 10.0), (0.4, 15.0), (0.19, None), (0.41, None)]
)
def test_interpolation_is_linear_and_never_extrapolates(at, expected):
    points = [(0.4, 15.0), (0.2, 10.0), (0.3, 12.0)]
    found = curves.interpolate(points, at)
    assert found == expected if expected is None else found == pytest.approx(expected)


def test_points_at_the_same_compute_fraction_count_as_their_mean():
    assert curves.interpolate([(0.2, 1.0), (0.2, 3.0), (0.4, 4.0)], 0.3) == pytest.approx(3.0)
    assert curves.interpolate([], 0.3) is None


def test_capped_psnr_is_no_part_of_a_curve():
    row = {"psnr_db": {"mean": 100.0}, "identical": 4, "psnr_ode_db": None, "judge_distance": 1.0}
    assert curves.curve_values({**row, "prompt_accuracy": 1.0})["psnr_db"] is None


def test_the_documented_configuration_covers_every_method():
    documented = load_family_config(ROOT / "configs" / "flux.yaml")
    assert set(METHODS) <= set(documented)


def test_rows_name_the_familys_own_solver():
    rows = plan.comparison_rows([UNCACHED, "Fb"], [50], DOCUMENTED, {}, (DDIM, DPM_SOLVER))
    assert [row.solver for row in rows] == [DDIM, DDIM]
    fewer = plan.same_compute_rows(rows, dict.fromkeys((r.key for r in rows), 0.5), (DDIM, EULER))
    assert [row.name for row in fewer] == ["DDIM, fewer steps", "Euler, fewer steps"]
    (uncached, *_) = plan.gamma_lambda_rows(["Auto"], [50], DOCUMENTED, {}, (DDIM, DPM_SOLVER))
    assert uncached == rows[0] == plan.uncached_row(50, DDIM)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_sweep_of_every_method_at_its_usual_steps(name):
    family = FAMILIES[name]
    assert {family.steps, 28} & SWEEPS[name].keys()
    rows = sweep.sweep_rows(
        METHOD_NAMES, [family.steps], DOCUMENTED, {}, family.solvers, SWEEPS[name]
    )
    fewer = {f"{solver}, fewer steps" for solver in family.solvers}
    assert {row.name for row in rows} == {*METHOD_NAMES, *fewer}
    assert {row.solver for row in rows if row.config} == {family.solvers[0]}


def test_an_ode_whose_start_moves_is_solved_for_every_step_count():
    moving, fixed = FAMILIES["dit"].ode, FAMILIES["flux"].ode
    assert plan.ode_row(50, moving) != plan.ode_row(28, moving)
    assert plan.ode_row(50, fixed) == plan.ode_row(28, fixed)


def test_only_clips_have_a_temporal_curve():
    row = {"psnr_db": {"mean": 30.0}, "identical": 0, "psnr_ode_db": None, "judge_distance": 1.0}
    row["prompt_accuracy"] = 1.0
    assert "temporal_psnr_db" not in curves.curve_values(row)
    clip = {**row, "temporal_psnr_db": {"mean": 40.0}}
    assert curves.curve_values(clip)["temporal_psnr_db"] == 40.0


# -- learned plans ---------------------------------------------------------------------------------


def write_plan(directory, weight=0.1, guidance_scale=3.0):
    course = Course(steps=(0, 2), coefficients=((weight,), (0.2, 0.3)), psnr_db=None)
    plan = Plan(
        name="plan",
        sampler={"class": "Any"},
        times=tuple(1.0 - k / 8 for k in range(9)),
        guidance_scale=guidance_scale,
        courses=(course,),
    )
    PlanFile(fingerprints={"transformer": "0"}, plans=(plan,)).save(directory / "plan.json")


def test_a_stored_plan_gives_a_row_a_budget_where_it_fits(tmp_path):
    def learned(steps, scale=3.0):
        return sweep.learned_rows([LEARNED], tmp_path, steps, scale, EULER)

    assert learned(8) == []
    write_plan(tmp_path)
    (row,) = learned(8)
    assert (row.name, row.config.target_compute) == (LEARNED, 0.25)
    assert learned(9) == [] and learned(8, scale=4.0) == []
    assert sweep.learned_rows(["Auto"], tmp_path, 8, 3.0, EULER) == []


def test_another_plan_is_another_row_and_other_rows_keep_their_keys(tmp_path):
    write_plan(tmp_path)
    (before,) = sweep.learned_rows([LEARNED], tmp_path, 8, None, EULER)
    write_plan(tmp_path, weight=0.15)
    (after,) = sweep.learned_rows([LEARNED], tmp_path, 8, None, EULER)
    assert before.config == after.config and before.key != after.key
    assert "plan" not in plan.uncached_row(8).to_dict()


def test_rows_that_learn_leave_stored_plans_aside(tmp_path):
    write_plan(tmp_path)
    rows = sweep.learned_rows([LEARNING], tmp_path, 28, None, EULER)
    assert [row.config.target_compute for row in rows] == list(sweep.LEARNED_SHARES)
    assert all(row.config.learn == 1 and not row.config.use_plan for row in rows)
    with pytest.raises(ValueError, match="none of Auto, learn=1 has it"):
        plan.check_options_act([LEARNING], {"rel_l1_thresh": 0.1})
