"""Learned correction on a plain sampling loop, whose answer is known, and on tiny pipelines."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from tests.pipelines import CASES, counted_calls, run
from xfuser_adacorr import (
    Auto,
    Learned,
    Replay,
    cache_summary,
    calibrate_learned,
    disable_cache,
    enable_cache,
    save_plans,
)
from xfuser_adacorr.model_executor.cache.calibration.learned import STARTS
from xfuser_adacorr.model_executor.cache.calibration.plan_file import PlanFile
from xfuser_adacorr.model_executor.cache.flow_coordinates import flow_points
from xfuser_adacorr.model_executor.cache.methods.auto import LEARNED_COMPUTE
from xfuser_adacorr.model_executor.cache.schedulers import read_places

STEPS = 12
SAMPLERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "euler": lambda: EulerDiscreteScheduler(timestep_spacing="trailing"),
    "ddim": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "dpm": lambda: DPMSolverMultistepScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(),
}


COURSE = {"steps": [0], "coefficients": [[math.nan]], "psnr_db": None}
NOT_FINITE = json.dumps(
    {
        "method": "Learned",
        "schema": 1,
        "fingerprints": {},
        "plans": [{"times": [1, 0], "courses": [COURSE]}],
    }
)


class Drift(nn.Module):
    """Predicts such that noise - picture is ``a + b t`` in flow time t, whatever the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 8))
        self.b = nn.Parameter(torch.randn(4, 8))
        self.calls = 0

    def forward(self, latents, label, picture, noise, flow):
        self.calls += 1
        velocity = self.a[label] + self.b[label] * (noise / (picture + noise))
        return velocity if flow else (latents + picture * velocity) / (picture + noise)


class Loop:
    """A pipeline in a few lines."""

    def __init__(self, scheduler, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer, self.scheduler = Drift(), scheduler

    @torch.no_grad()
    def __call__(
        self,
        label,
        num_inference_steps,
        generator,
        guidance_scale=2.0,
        callback=None,
        begin=0,
        **step,
    ):
        self._guidance_scale = guidance_scale
        self.scheduler.set_timesteps(num_inference_steps)
        if begin:
            self.scheduler.set_begin_index(begin)
        flow = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        latents = torch.randn(1, 8, generator=generator)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for place, t in enumerate(self.scheduler.timesteps[begin:]):
            picture, noise = self.levels(place + begin, t, flow)
            scaled = latents
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(latents, t)
            output = self.transformer(scaled, torch.tensor(label), picture, noise, flow)
            latents = self.scheduler.step(output, t, latents, return_dict=False, **step)[0]
            if callback is not None:
                latents = callback(place, latents)
        return (latents,)

    def levels(self, place, t, flow):
        """a and s of the latents given to the model."""
        if isinstance(self.scheduler, DDIMScheduler):
            picture = self.scheduler.alphas_cumprod[t].sqrt()
            return picture, (1.0 - picture**2).sqrt()
        level = self.scheduler.sigmas[place]
        if flow:
            return 1.0 - level, level
        return 1.0 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt()


def sampled(pipe, seed=0, label=(1,), steps=STEPS, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return pipe(list(label), steps, generator, **arguments)[0]


def calibrated(pipe, path, **options):
    defaults = {"num_inference_steps": STEPS, "budgets": (0.25, 0.5), "search_evaluations": 3}
    labels = [{"label": [label]} for label in range(options.pop("prompts", 4))]
    calibrate_learned(pipe, labels, output=path, progress=False, **(defaults | options))
    return PlanFile.load(path)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "plan.json")


@pytest.fixture
def pipe():
    return Loop(SAMPLERS["flow"]())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outputs_linear_in_time_are_followed_exactly(sampler, path):
    pipe = Loop(SAMPLERS[sampler]())
    calibrated(pipe, path, held_out=0)
    plain = sampled(pipe, seed=77)
    pipe.transformer.calls = 0
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    found = sampled(pipe, seed=77)
    assert pipe.transformer.calls == 3
    # The ridge of 1e-4 keeps it from being exact to the last bit.
    torch.testing.assert_close(found, plain, rtol=0.0, atol=2e-3 * float(plain.norm()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_flow_coordinates_of_noise_and_picture(sampler):
    """``a x0 + s n`` is ``(1 - t) x0 + t n`` in y, at every place of the run."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(STEPS)
    pipe = Loop(scheduler)
    flow = sampler == "flow"
    x0, n = torch.randn(5), torch.randn(5)
    points = flow_points(read_places(scheduler))
    for place, t in enumerate(scheduler.timesteps):
        picture, noise = pipe.levels(place, t, flow)
        scaled = picture * x0 + noise * n
        latents = scaled
        if sampler == "euler":  # its own latents, which scale_model_input brings to these
            latents = scaled * (1 + scheduler.sigmas[place] ** 2).sqrt()
        y, time = points[place].to_flow(latents), points[place].time
        torch.testing.assert_close(y, (1 - time) * x0 + time * n, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(points[place].to_latents(y, latents), latents)
    if sampler == "ddim":
        angle = math.acos(math.sqrt(float(scheduler.final_alpha_cumprod)))
        sin, cos = math.sin(angle), math.cos(angle)
        assert points[-1].time == pytest.approx(sin / (sin + cos))
    else:
        assert points[-1].time == 0.0
    assert len(points) == STEPS + 1


def test_the_summary_names_the_plan(pipe, path):
    file = calibrated(pipe, path, name="drift")
    enable_cache(pipe, Learned(target_compute=0.5, plan=path))
    sampled(pipe)
    summary = cache_summary(pipe)
    assert summary.method == "Learned" and summary.plan == "drift"
    assert summary.expected_psnr_db == file.plans[0].courses[1].psnr_db
    assert (summary.computed_steps, summary.num_steps) == (6, STEPS)
    assert summary.compute_fraction == 0.5
    assert "plan drift, expected" in str(summary)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_others_add_to_the_latents_stays(pipe, path, in_place):
    """The velocity does not depend on the latents here, so that all of the change remains."""
    calibrated(pipe, path, held_out=0)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    untouched = sampled(pipe)
    calls = cache_summary(pipe).trace.calls
    after = next(i for i in range(1, STEPS - 1) if not calls[i + 1].refreshed)
    change = torch.randn(1, 8)

    def callback(place, latents):
        if place != after:
            return latents
        return latents.add_(change) if in_place else latents + change

    torch.testing.assert_close(sampled(pipe, callback=callback), untouched + change)


def test_another_number_of_steps_is_refused_and_interpolated_on_request(pipe, path):
    calibrated(pipe, path, held_out=0)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    with pytest.raises(ValueError, match="12 steps, not 16"):
        sampled(pipe, steps=16)
    disable_cache(pipe)
    plain = sampled(pipe, steps=16)
    enable_cache(pipe, Learned(target_compute=0.2, plan=path, interpolate=True))
    found = sampled(pipe, steps=16)
    summary = cache_summary(pipe)
    assert summary.plan.endswith("(interpolated)") and summary.expected_psnr_db is None
    assert summary.computed_steps == 3 and "PSNR not known" in str(summary)
    # Coefficients of other steps are not exact, but they are a method of second order.
    assert (found - plain).norm() < 0.1 * plain.norm()


def test_an_interpolated_plan_on_its_own_steps_is_itself(pipe, path):
    plan = calibrated(pipe, path).plans[0]
    pipe.scheduler.set_timesteps(STEPS)
    carried = plan.carried_over(read_places(pipe.scheduler))
    for mine, theirs in zip(carried.courses, plan.courses, strict=True):
        assert mine.steps == theirs.steps
        for a, b in zip(mine.coefficients, theirs.coefficients, strict=True):
            assert a == pytest.approx(b)


def other_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    sampled(pipe)


def other_sampler(pipe):
    pipe.scheduler = UniPCMultistepScheduler()
    sampled(pipe)


def several_calls_a_step(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    sampled(pipe)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda pipe: sampled(pipe, guidance_scale=5.0), "guidance scale 2, not 5"),
        (lambda pipe: sampled(pipe, begin=3), "begins at step 3"),
        (other_shift, "other noise levels"),
        (other_sampler, "class 'FlowMatchEulerDiscreteScheduler', not 'UniPCMultistepScheduler'"),
        (several_calls_a_step, "calls the model more than once a step"),
    ],
)
def test_a_run_that_the_plan_was_not_fitted_on_is_refused(pipe, path, other, message):
    calibrated(pipe, path)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    with pytest.raises(ValueError, match=message):
        other(pipe)


def test_noise_in_the_steps_is_refused(path):
    pipe = Loop(SAMPLERS["ddim"]())
    calibrated(pipe, path)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    with pytest.raises(ValueError, match="the sampler adds noise"):
        sampled(pipe, eta=0.5)


def test_another_models_plan_is_refused(pipe, path):
    calibrated(pipe, path)
    other = Loop(SAMPLERS["flow"](), seed=1)
    with pytest.raises(ValueError, match="fitted on another transformer"):
        enable_cache(other, Learned(plan=path))


def test_without_a_plan_it_says_so(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="calibrate_learned"):
        enable_cache(pipe, "Learned")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        enable_cache(pipe, Learned(plan=str(tmp_path / "nowhere.json")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a file of learned plans"),
        ('{"method": "Fast"}', "method 'Fast'"),
        ('{"method": "Learned", "schema": 99}', "schema 99"),
        (NOT_FINITE, "coefficients of the course of 1 steps are not finite"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(pipe, tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        enable_cache(pipe, Learned(plan=str(tmp_path / "plan.json")))


def test_a_plan_file_is_read_as_it_was_written(pipe, path):
    written = calibrated(pipe, path)
    read = PlanFile.load(path)
    assert read == written


def test_targets_choose_the_budget(pipe, path):
    plan = calibrated(pipe, path, budgets=(0.17, 0.25, 0.5)).plans[0]
    assert [len(course.steps) for course in plan.courses] == [2, 3, 6]
    assert plan.course_for(0.22) is plan.courses[1]
    assert plan.course_for(0.18) is plan.courses[0]
    with pytest.raises(ValueError, match="0.17, 0.25, 0.50, none near 0.35"):
        plan.course_for(0.35)
    middle = plan.courses[1].psnr_db
    assert plan.course_for(target_psnr=middle) in plan.courses[:2]
    with pytest.raises(ValueError, match="reaches 200 dB"):
        plan.course_for(target_psnr=200.0)


@pytest.mark.parametrize(
    "options",
    [
        {"target_compute": 0.3, "target_psnr": 30.0},
        {"target_compute": 1.2},
        {"target_psnr": -1.0},
        {"interpolate": 1},
        {"plan": 3},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        Learned(**options)


def test_a_trace_is_replayed_bit_for_bit(pipe, path):
    calibrated(pipe, path)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    found, trace = sampled(pipe), cache_summary(pipe).trace
    disable_cache(pipe)
    enable_cache(pipe, Replay(trace=trace))
    assert torch.equal(sampled(pipe), found)
    assert cache_summary(pipe).computed_steps == 3


def test_gradients_turn_it_off(pipe, path):
    calibrated(pipe, path)
    plain = sampled(pipe)
    enable_cache(pipe, Learned(target_compute=0.25, plan=path))
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        found = Loop.__call__.__wrapped__(pipe, [1], STEPS, generator)[0]
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), plain)


# -- Auto ----------------------------------------------------------------------------------------


def beside(pipe, path):
    """The pipeline as if it had been loaded from the plan's directory."""
    pipe.config = {"_name_or_path": path.removesuffix("/plan.json")}
    return pipe


def test_auto_follows_the_plan_beside_the_pipeline(pipe, path):
    calibrated(pipe, path, name="drift")
    enable_cache(beside(pipe, path), Auto(target_compute=0.26))
    found, summary = sampled(pipe), cache_summary(pipe)
    assert (summary.plan, summary.computed_steps) == ("drift", 3)
    disable_cache(pipe)
    enable_cache(pipe, Learned(target_compute=0.25))
    assert torch.equal(sampled(pipe), found)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"target_compute": 0.5, "use_plan": False}, {}),
        ({"tolerance": 0.01}, {}),
        ({"target_compute": 0.5, "gamma": 2.0}, {}),
        ({"target_compute": 0.5, "warmup": 2}, {}),
        ({"target_compute": 0.5}, {"steps": 9}),
        ({"target_compute": 0.8}, {}),
        ({"target_compute": 0.5}, {"guidance_scale": 7.0}),
        ({"target_compute": 0.5}, {"begin": 2}),
    ],
)
def test_auto_keeps_its_own_rule_where_no_plan_fits(pipe, path, options, arguments, caplog):
    enable_cache(pipe, Auto(**{**options, "use_plan": False}))
    wanted = sampled(pipe, **arguments)
    disable_cache(pipe)
    calibrated(pipe, path)
    enable_cache(beside(pipe, path), Auto(**options))
    with caplog.at_level(logging.INFO):
        found = sampled(pipe, **arguments)
    assert torch.equal(found, wanted)
    assert cache_summary(pipe).plan is None
    said = [r.message for r in caplog.records if "Auto decides by its own rule" in r.message]
    assert len(said) == (1 if list(options) == ["target_compute"] else 0)


def test_auto_keeps_its_own_rule_where_the_first_step_tells_otherwise(path):
    """DDIM knows only by the timestep where a run begins, and by eta whether noise is drawn."""
    pipe = Loop(SAMPLERS["ddim"]())
    torch.manual_seed(0)
    enable_cache(pipe, Auto(target_compute=0.5))
    wanted = sampled(pipe, eta=0.3)
    disable_cache(pipe)
    calibrated(pipe, path)
    enable_cache(beside(pipe, path), Auto(target_compute=0.5))
    torch.manual_seed(0)
    sampled(pipe, eta=0.3)
    assert cache_summary(pipe).plan is None
    assert wanted.isfinite().all()
    sampled(pipe)
    assert cache_summary(pipe).plan is not None


def test_auto_keeps_its_own_rule_where_it_was_measured_to_be_better(pipe, path, caplog):
    file = calibrated(pipe, path)
    assert all(course.rule_psnr_db is not None for course in file.plans[0].courses)

    def stated(lead):
        """The plan file with the rule ahead by so much, dB."""
        courses = [replace(c, rule_psnr_db=c.psnr_db + lead) for c in file.plans[0].courses]
        file.with_plan(replace(file.plans[0], courses=tuple(courses))).save(path)

    stated(0.1)
    enable_cache(beside(pipe, path), Auto(target_compute=0.26))
    with caplog.at_level(logging.INFO):
        sampled(pipe)
    assert cache_summary(pipe).plan is None
    assert "Auto decides by its own rule: plan: where it was measured" in caplog.text
    disable_cache(pipe)
    for method in (Learned(target_compute=0.26), Auto(target_psnr=1.0)):  # both ask for the plan
        enable_cache(pipe, method)
        sampled(pipe)
        assert cache_summary(pipe).plan is not None
        disable_cache(pipe)
    stated(-0.1)
    enable_cache(pipe, Auto(target_compute=0.26))
    sampled(pipe)
    assert cache_summary(pipe).plan is not None


def test_auto_with_a_target_psnr_needs_the_plan(pipe, path):
    with pytest.raises(FileNotFoundError, match="calibrate_learned"):
        enable_cache(pipe, Auto(target_psnr=30.0))
    plan = calibrated(pipe, path).plans[0]
    enable_cache(beside(pipe, path), Auto(target_psnr=plan.courses[0].psnr_db))
    sampled(pipe)
    assert cache_summary(pipe).expected_psnr_db >= plan.courses[0].psnr_db
    with pytest.raises(ValueError, match="target_psnr needs a learned plan that fits"):
        sampled(pipe, steps=9)


@pytest.mark.parametrize(
    "options",
    [
        {"plan": "plan.json"},
        {"plan": "plan.json", "tolerance": 0.1},
        {"plan": "plan.json", "target_compute": 0.5, "use_plan": False},
        {"target_psnr": 30.0, "use_plan": False},
        {"target_psnr": 30.0, "gamma": 2.0},
        {"learn": 2, "target_compute": 0.5, "warmup": 1},
        {"learn": 0, "target_compute": 0.5},
        {"learn": 2, "target_psnr": 30.0},
    ],
)
def test_options_of_plans_that_could_not_act_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Auto(**options)


def test_auto_passes_over_another_models_plan(pipe, path, caplog):
    calibrated(pipe, path)
    other = beside(Loop(SAMPLERS["flow"](), seed=1), path)
    with caplog.at_level(logging.INFO):
        enable_cache(other, Auto(target_compute=0.5))
    sampled(other)
    assert cache_summary(other).plan is None
    assert "fitted on another transformer" in caplog.text
    with pytest.raises(ValueError, match="fitted on another transformer"):
        enable_cache(Loop(SAMPLERS["flow"](), seed=1), Auto(target_compute=0.5, plan=path))


# -- Auto that learns from its first generations ---------------------------------------------------


def test_auto_learns_from_its_first_generations(pipe):
    plain = [sampled(pipe, seed, [label]) for seed, label in enumerate((0, 1, 2))]
    pipe.transformer.calls = 0
    enable_cache(pipe, Auto(target_compute=0.25, learn=2))
    for seed in (0, 1):
        assert torch.equal(sampled(pipe, seed, [seed]), plain[seed])
        assert cache_summary(pipe).computed_steps == STEPS
    pipe.transformer.calls = 0
    found, summary = sampled(pipe, 2, [2]), cache_summary(pipe)
    assert pipe.transformer.calls == summary.computed_steps == 3
    assert summary.plan == "learned from 2 generations" and summary.expected_psnr_db is None
    torch.testing.assert_close(found, plain[2], rtol=0.0, atol=5e-3 * float(plain[2].norm()))
    disable_cache(pipe)
    assert type(pipe) is Loop
    assert torch.equal(sampled(pipe, 2, [2]), plain[2])


@pytest.mark.parametrize(("generations", "searches"), [(5, False), (6, True)])
def test_schedules_are_searched_where_a_third_can_be_left_out_of_the_fits(
    pipe, generations, searches
):
    enable_cache(pipe, Auto(target_compute=0.25, learn=generations))
    for seed in range(generations):
        sampled(pipe, seed)
    replayed = pipe.transformer.calls - generations * STEPS
    assert (replayed > generations * STARTS * 3) is searches


def test_learning_leaves_the_stored_plan_aside_if_asked_to(pipe, path):
    stored = calibrated(pipe, path).plans[0].name
    for options, plan in (({}, stored), ({"use_plan": False}, "learned from 1 generations")):
        enable_cache(beside(pipe, path), Auto(target_compute=0.26, learn=1, **options))
        sampled(pipe)
        sampled(pipe, 1)
        assert cache_summary(pipe).plan == plan
        disable_cache(pipe)


def test_generations_that_are_not_alike_do_not_count(pipe):
    enable_cache(pipe, Auto(target_compute=0.25, learn=2))
    sampled(pipe)
    for arguments in ({"steps": 8}, {"begin": 3}):
        sampled(pipe, **arguments)
        summary = cache_summary(pipe)
        assert summary.plan is None and summary.computed_steps < summary.num_steps
    sampled(pipe, 1)
    sampled(pipe, 2)
    assert cache_summary(pipe).plan == "learned from 2 generations"


def test_other_steps_are_learned_anew_and_all_plans_are_saved(pipe, path):
    enable_cache(pipe, Auto(target_compute=0.25, learn=1))
    with pytest.raises(ValueError, match="no learned plan to save"):
        save_plans(pipe, path)
    for steps in (STEPS, 8):
        sampled(pipe, steps=steps)
        assert cache_summary(pipe).computed_steps == steps, "computed in full"
    for steps in (8, STEPS):
        sampled(pipe, seed=1, steps=steps, guidance_scale=3.0)
        assert cache_summary(pipe).computed_steps == steps // 4
    learned = sampled(pipe, seed=2)
    assert save_plans(pipe, path) == Path(path)
    disable_cache(pipe)
    enable_cache(pipe, Auto(target_compute=0.25, plan=path))
    assert torch.equal(sampled(pipe, seed=2), learned)
    assert cache_summary(pipe).plan == "learned from 1 generations"


def test_learning_stops_with_the_cache(pipe):
    enable_cache(pipe, Auto(target_compute=0.25, learn=2))
    sampled(pipe)
    disable_cache(pipe)
    assert type(pipe) is Loop and "_cache_owner" not in vars(pipe)


def test_learning_sets_random_numbers_back():
    """Without a generator the noise of a generation is the global one's."""
    case = CASES["flux"]
    pipe = case.build()
    enable_cache(pipe, Auto(target_compute=0.45, learn=1))
    torch.manual_seed(3)
    with torch.no_grad():
        pipe(**case.arguments(False), num_inference_steps=case.steps, output_type="latent")
    plain = run(case, pipe, generator=torch.Generator().manual_seed(4))
    assert cache_summary(pipe).plan is not None and plain.isfinite().all()


def test_learning_has_a_target_and_needs_a_pipeline(pipe):
    assert Auto(learn=2).target_compute == LEARNED_COMPUTE
    for option in ({"tolerance": 0.01}, {"target_psnr": 40.0}):
        with pytest.raises(ValueError, match="learn acts with target_compute"):
            Auto(learn=2, **option)
    with pytest.raises(ValueError, match="learn acts with a target"):
        Auto(learn=2, gamma=0.5)
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="learn needs a pipeline"):
        enable_cache(pipe.transformer, Auto(target_compute=0.5, learn=2), scheduler=pipe.scheduler)


# -- tiny pipelines ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "dit", "flux2-klein", "sana-euler"])
def test_a_pipeline_runs_along_the_trajectory_that_was_fitted(name, path):
    """What calibration had at the end is what the pipeline returns, calls counted."""
    case = CASES[name]
    pipe = case.build()
    prompts = [{**case.arguments(False), "seed": seed} for seed in range(3)]
    options = {"output_type": case.output_type} if case.output_type else {}
    calibrate_learned(
        pipe,
        prompts,
        num_inference_steps=case.steps,
        budgets=(0.45,),
        search_evaluations=1,
        output=path,
        held_out=0,
        progress=False,
        **options,
    )
    course = PlanFile.load(path).plans[0].courses[0]
    plain = [run(case, pipe, seed=seed) for seed in range(3)]
    enable_cache(pipe, Learned(target_compute=len(course.steps) / case.steps, plan=path))
    with counted_calls(case, pipe) as calls:
        found = [run(case, pipe, seed=seed) for seed in range(3)]
    assert calls.total() == 3 * case.calls_a_step * len(course.steps)
    if case.output_type == "latent":
        errors = [float((a - b).square().mean()) for a, b in zip(found, plain, strict=True)]
        peaks = [float(b.max() - b.min()) for b in plain]
        psnr = [10 * math.log10(peak**2 / error) for peak, error in zip(peaks, errors, strict=True)]
        assert sum(psnr) / 3 == pytest.approx(course.psnr_db, abs=0.05)
    disable_cache(pipe)
    assert torch.equal(run(case, pipe, seed=0), plain[0])
