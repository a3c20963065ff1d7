"""`calibrate_learned`: what it asks of a pipeline, stores, refuses, and resumes."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cache.methods.test_learned import SAMPLERS, STEPS, Loop, calibrated, sampled
from tests.pipelines import CASES
from xfuser_adacorr import (
    Auto,
    Learned,
    calibrate_learned,
    disable_cache,
    enable_cache,
    measure_plan,
)
from xfuser_adacorr.model_executor.cache.calibration import files, trajectories
from xfuser_adacorr.model_executor.cache.calibration import learned as calibration
from xfuser_adacorr.model_executor.cache.calibration.learned_runs import ClosedLoop
from xfuser_adacorr.model_executor.cache.calibration.plan_file import PlanFile
from xfuser_adacorr.model_executor.cache.calibration.prompt_calls import batched_calls


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "plan.json")


@pytest.fixture
def pipe():
    return Loop(SAMPLERS["flow"]())


def full_disk(path, text):
    """Half of it, as a writer leaves it."""
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def flux_calls(count, batch_size):
    prompts = [{**CASES["flux"].arguments(False), "seed": seed} for seed in range(count)]
    options = {"num_inference_steps": 7, "output_type": "latent"}
    return batched_calls(prompts, batch_size, 0, options)


def fitted(pipe, calls, schedule=(0, 2, 5), memory_limit=1e9):
    loop = ClosedLoop(pipe, {"transformer": pipe.transformer}, calls, memory_limit)
    loop.record()
    return loop, *loop.follow(schedule)


def test_calls_side_by_side_are_fitted_as_one_batch_is():
    pipe = CASES["flux"].build()
    _, alone, final = fitted(pipe, flux_calls(3, 1))
    _, together, final_together = fitted(pipe, flux_calls(3, 3))
    torch.testing.assert_close(final, final_together, rtol=1e-3, atol=1e-3)
    for a, b in zip(alone.coefficients, together.coefficients, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


def test_both_latents_of_a_prompt_are_fitted_on_or_neither(pipe):
    """DiT's pipeline has every prompt's latents twice in a batch, all first ones first."""
    loop = ClosedLoop(pipe, {}, [{"seeds": [0, 1, 2, 3]}, {"seeds": [4, 5]}, {"seeds": [6]}])
    loop.uncached = SimpleNamespace(shape=lambda index: (9, (8, 4, 2)[index], 5))
    loop._count_rows()
    flags = loop.fitted.tolist()
    assert flags == [True, True, False, True] * 2 + [True, False] * 2 + [True] * 2


def test_trajectories_in_files_are_those_in_memory():
    pipe = CASES["flux"].build()
    in_memory, *_ = fitted(pipe, flux_calls(2, 1))
    in_files, *_ = fitted(pipe, flux_calls(2, 1), memory_limit=0)
    assert in_files.uncached._folder is not None and in_memory.uncached._folder is None
    for place in range(8):
        assert torch.equal(in_files.uncached.at(place), in_memory.uncached.at(place))


def test_recorded_trajectories_are_the_uncached_runs(pipe):
    calls = batched_calls([{"label": [1], "seed": 5}], 1, 0, {"num_inference_steps": STEPS})
    loop, *_ = fitted(pipe, calls)
    seen = []
    final = sampled(pipe, seed=5, callback=lambda place, latents: seen.append(latents) or latents)
    assert torch.equal(loop.uncached.at(STEPS), final)
    for place, latents in enumerate(seen):
        torch.testing.assert_close(loop.uncached.at(place + 1), latents)


def test_a_known_beginning_is_not_computed_again(pipe):
    calls = batched_calls([{"label": [k]} for k in range(3)], 1, 0, {"num_inference_steps": STEPS})
    loop, known, _ = fitted(pipe, calls, (0, 3, 6, 9))
    fresh, final = loop.follow((0, 3, 6, 10))
    pipe.transformer.calls = 0
    again, final_again = loop.follow((0, 3, 6, 10), known)
    assert pipe.transformer.calls == 3 * 2, "the first step and the one that moved"
    assert again.coefficients == fresh.coefficients
    assert torch.equal(final, final_again)


def test_an_error_in_one_call_ends_them_all(pipe):
    calls = batched_calls([{"label": [k]} for k in range(3)], 1, 0, {"num_inference_steps": STEPS})
    loop, *_ = fitted(pipe, calls)
    calls[1]["label"] = [99]
    with pytest.raises(IndexError):
        loop.follow((0, 4, 8))
    calls[1]["label"] = [1]
    loop.follow((0, 4, 8))


def test_the_pipeline_is_left_as_it_was(pipe, path):
    before, scheduler = dict(vars(pipe)), pipe.scheduler
    calibrated(pipe, path)
    assert type(pipe.scheduler).__mro__[0] is type(scheduler) and pipe.scheduler is scheduler
    assert "_cache_owner" not in pipe.transformer.__dict__
    assert set(vars(pipe)) == set(before)


def test_an_interrupted_calibration_goes_on(pipe, path, monkeypatch):
    whole = calibrated(pipe, path)
    other = path.replace("plan.json", "other.json")
    find, counts = calibration.find_course, []

    def interrupted(loop, count, *arguments):
        counts.append(count)
        if len(counts) == 2:
            raise KeyboardInterrupt
        return find(loop, count, *arguments)

    monkeypatch.setattr(calibration, "find_course", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(pipe, other)
    with pytest.raises(
        ValueError, match=r"checkpoint: .* another calibration \(prompts_digest, seed"
    ):
        calibrated(pipe, other, seed=3)
    resumed = calibrated(pipe, other)
    assert counts == [3, 6, 6]
    assert resumed.plans[0].courses == whole.plans[0].courses


def test_a_checkpoint_of_another_sampler_or_none_at_all_is_refused(pipe, path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(calibration.PlanFile, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrated(pipe, path)
    pipe.scheduler = SAMPLERS["unipc"]()
    with pytest.raises(ValueError, match=r"another calibration \(samplers differ\)"):
        calibrated(pipe, path)
    Path(path + ".checkpoint").write_text('{"settings": {}')
    with pytest.raises(ValueError, match=r"checkpoint: .* is not one of a calibration .* remove"):
        calibrated(pipe, path)
    assert not Path(path).exists()


def test_plans_for_other_steps_stay_in_the_file(pipe, path):
    calibrated(pipe, path)
    calibrated(pipe, path, num_inference_steps=8)
    calibrated(pipe, path, budgets=(0.5,))
    assert [plan.num_steps for plan in PlanFile.load(path).plans] == [8, STEPS]


def test_the_psnr_is_of_the_prompts_held_out(pipe, path):
    plan = calibrated(pipe, path, held_out=1).plans[0]
    assert {course.measured_on for course in plan.courses} == {1}
    assert plan.settings["held_out"] == 1 and "torch" in plan.settings["versions"]


def test_what_is_not_finite_is_refused(pipe, path):
    with torch.no_grad():
        pipe.transformer.a[2] = float("nan")
    with pytest.raises(ValueError, match="uncached latents of call 2, sample 0, are not finite"):
        calibrated(pipe, path)


def test_samplers_that_no_plan_fits_are_refused(path):
    with pytest.raises(ValueError, match="calibration: the run begins|adds noise"):
        calibrated(Loop(SAMPLERS["ddim"]()), path, eta=0.5)
    with pytest.raises(ValueError, match="must begin at step 0"):
        calibrated(Loop(SAMPLERS["flow"]()), path, begin=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (1.4,)}, "budgets must be"),
        ({"held_out": 4}, "held_out must leave prompts"),
        ({"search_evaluations": 0}, "search_evaluations must be at least 1"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"output": None}, "output must be given"),
        ({"prompts": []}, r"prompts must be a list of texts or of arguments, got \[\]"),
        ({"prompts": "a cat"}, "prompts must be a list of texts or of arguments, got 'a cat'"),
    ],
)
def test_bad_arguments_are_named(pipe, path, options, message):
    options = {"output": path, "num_inference_steps": STEPS} | options
    prompts = options.pop("prompts", [{"label": [k]} for k in range(4)])
    with pytest.raises(ValueError, match=message):
        calibrate_learned(pipe, prompts, progress=False, **options)


def test_a_cache_must_not_be_enabled(pipe, path):
    enable_cache(pipe, Auto())
    with pytest.raises(ValueError, match="disable_cache first"):
        calibrated(pipe, path)


def test_prompts_are_batched_with_their_own_noise():
    calls = batched_calls(["a", "b", "c"], 2, 10, {"steps": 4})
    assert calls == [
        {"prompt": ["a", "b"], "steps": 4, "seeds": [10, 11]},
        {"prompt": "c", "steps": 4, "seeds": [12]},
    ]
    merged = batched_calls([{"class_labels": [1]}, {"class_labels": [2], "seed": 7}], 2, 0, {})
    assert merged == [{"class_labels": [1, 2], "seeds": [0, 7]}]


def test_a_negative_prompt_is_given_once_for_each_prompt():
    """Stable Diffusion refuses one text for a list of prompts."""
    calls = batched_calls(["a", "b", "c"], 2, 0, {"negative_prompt": "", "negative_prompt_2": "x"})
    assert [call["negative_prompt"] for call in calls] == [["", ""], ""]
    assert [call["negative_prompt_2"] for call in calls] == [["x", "x"], "x"]


def test_nothing_half_written_is_left(pipe, path, monkeypatch):
    calibrated(pipe, path)
    before = Path(path).read_text()

    def broken(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match=r"output: .*plan.json.* could not be written: disk full"):
        calibrated(pipe, path, seed=1)
    assert Path(path).read_text() == before
    assert [each.name for each in Path(path).parent.iterdir()] == ["plan.json"]


def test_a_full_disk_is_said_before_the_runs(pipe, path, monkeypatch):
    calibrated(pipe, path)
    before = Path(path).read_text()
    monkeypatch.setattr(Path, "write_text", full_disk)
    pipe.transformer.calls = 0
    with pytest.raises(
        OSError, match=r"output: .*checkpoint could not be written: .*No space left"
    ):
        calibrated(pipe, path, seed=1)
    assert pipe.transformer.calls == 0
    assert Path(path).read_text() == before
    assert [each.name for each in Path(path).parent.iterdir()] == ["plan.json"]


def test_a_disk_that_fills_up_costs_the_budget_that_was_being_fitted(pipe, path, monkeypatch):
    whole = calibrated(pipe, path.replace("plan", "whole"))
    save, counts = calibration.Checkpoint.save, []

    def saved(checkpoint):
        counts.append([*checkpoint.courses])
        if len(counts) == 2:
            monkeypatch.setattr(Path, "write_text", full_disk)
        save(checkpoint)

    monkeypatch.setattr(calibration.Checkpoint, "save", saved)
    with pytest.raises(OSError, match=r"output: .* could not be written: .*No space left"):
        calibrated(pipe, path)
    assert not Path(path).exists()
    monkeypatch.undo()
    assert calibrated(pipe, path).plans[0].courses == whole.plans[0].courses
    names = {each.name for each in Path(path).parent.iterdir()}
    assert names == {"plan.json", "whole.json"} and counts == [[3], [3, 6]]


def test_no_room_for_trajectories_is_said_before_they_are_written(pipe, path, monkeypatch):
    monkeypatch.setattr(trajectories.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(OSError, match="memory_limit_gib: the uncached runs beyond it need"):
        calibrated(pipe, path, memory_limit_gib=0.0)
    assert not Path(path).exists()


def test_few_prompts_are_said_to_be_few(pipe, path, caplog):
    calibrated(pipe, path, budgets=(0.25,))
    assert "to fit on are few" in caplog.text


def test_pictures_that_are_not_finite_are_refused(path):
    pipe = Loop(SAMPLERS["flow"]())
    sample = type(pipe).__call__

    class Black(Loop):
        def __call__(self, *arguments, **named):
            return (sample(self, *arguments, **named)[0] * float("nan"),)

    pipe.__class__ = Black
    with pytest.raises(ValueError, match="an uncached picture of call 0 is not finite"):
        calibrated(pipe, path)


def test_pictures_along_a_plan_that_are_not_finite_are_refused(pipe, path):
    """As of an autoencoder that overflows on latents a little off; the plan stays as it was."""
    calibrated(pipe, path, held_out=0)
    before, sample = Path(path).read_text(), type(pipe).__call__

    class Black(Loop):
        def __call__(self, *arguments, **named):
            calls = self.transformer.calls
            (latents,) = sample(self, *arguments, **named)
            cached = self.transformer.calls - calls < STEPS
            return (latents * float("nan") if cached else latents,)

    pipe.__class__ = Black
    call = {"num_inference_steps": STEPS, "plan": path, "progress": False}
    with pytest.raises(ValueError, match="plan: a picture of call 0 along 3 steps is not finite"):
        measure_plan(pipe, [{"label": [0]}], **call)
    assert Path(path).read_text() == before


def test_one_prompt_is_fitted_without_a_singular_matrix(pipe, path):
    """More velocities than a constant and a line span: the ridge alone decides between them."""
    course = calibrated(pipe, path, budgets=(0.5,), prompts=1, held_out=0).plans[0].courses[0]
    assert all(abs(b) < 2.0 for row in course.coefficients for b in row)
    plain = sampled(pipe, seed=9)
    enable_cache(pipe, Learned(target_compute=0.5, plan=path))
    torch.testing.assert_close(sampled(pipe, seed=9), plain, rtol=0, atol=2e-3 * plain.norm())


def test_a_measured_psnr_is_that_of_the_pictures(path):
    """Counted again by hand, for prompts that the plan was not fitted on."""
    pipe, arguments = CASES["flux"].build(), CASES["flux"].arguments(False)
    options = {"num_inference_steps": 7, "output_type": "np", "progress": False}
    fitting = [{**arguments, "seed": seed} for seed in range(3)]
    budget = {"budgets": (0.5,), "search_evaluations": 1, "held_out": 1}
    calibrate_learned(pipe, fitting, output=path, **budget, **options)
    measure_plan(pipe, [{**arguments, "seed": seed} for seed in (70, 71)], plan=path, **options)

    def picture(seed):
        generator = torch.Generator().manual_seed(seed)
        call = {**arguments, "num_inference_steps": 7, "output_type": "pt"}
        return pipe(**call, generator=generator).images[0].double()

    def mean_psnr_db(method):
        enable_cache(pipe, method)
        pairs = [(picture(seed), x) for seed, x in zip((70, 71), wanted, strict=True)]
        disable_cache(pipe)
        return sum(float(-10 * torch.log10((a - b).square().mean())) for a, b in pairs) / 2

    wanted = [picture(seed) for seed in (70, 71)]
    (course,) = PlanFile.load(path).plans[0].courses
    assert course.measured_on == 2
    found = mean_psnr_db(Learned(target_compute=4 / 7, plan=path))
    assert course.psnr_db == pytest.approx(found, abs=0.05)
    by_rule = mean_psnr_db(Auto(target_compute=4 / 7, use_plan=False))
    assert course.rule_psnr_db == pytest.approx(by_rule, abs=0.05)


def test_measuring_refuses_what_no_plan_fits(pipe, path, tmp_path):
    prompts = [{"label": [0]}]
    with pytest.raises(FileNotFoundError, match="plan: no file"):
        measure_plan(pipe, prompts, num_inference_steps=STEPS, plan=path)
    calibrated(pipe, path)
    before = Path(path).read_text()
    with pytest.raises(ValueError, match="12 steps, not 9"):
        measure_plan(pipe, prompts, num_inference_steps=9, plan=path, progress=False)
    with pytest.raises(ValueError, match="fitted on another transformer"):
        measure_plan(
            Loop(SAMPLERS["flow"](), seed=3), prompts, num_inference_steps=STEPS, plan=path
        )
    enable_cache(pipe, "Auto")
    with pytest.raises(ValueError, match="call disable_cache first"):
        measure_plan(pipe, prompts, num_inference_steps=STEPS, plan=path)
    assert Path(path).read_text() == before
