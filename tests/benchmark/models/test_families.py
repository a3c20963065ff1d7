"""The benchmark's families, end to end on tiny random pipelines, and what each refuses."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from benchmark import settings
from benchmark.errors import BenchmarkError
from benchmark.models import families, loading
from benchmark.models.families import FAMILIES
from benchmark.models.schedulers import own_solver
from benchmark.score import judging
from benchmark.small.clip_judge import ClipJudge
from benchmark.small.judge import Judge, save_judge
from tests.benchmark.tiny import TINY, read_settings, run_study

STEPS, ODE_STEPS = 6, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny random pipeline of every new family, and untrained judges."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in TINY.items():
        torch.manual_seed(0)
        pipeline, transformer = make()
        pipeline.register_modules(transformer=transformer)
        pipeline.save_pretrained(folder / name)
    save_judge(Judge(8, 16).eval(), folder / "judge")
    save_judge(ClipJudge(8, 16).eval(), folder / "clip_judge")
    return folder


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """Runs the command on a family with few pictures; returns the exit code."""

    def run(name, *arguments):
        family = FAMILIES[name]
        short = replace(family, ode=replace(family.ode, steps=ODE_STEPS))
        monkeypatch.setitem(families.FAMILIES, name, short)
        given = ["--model_type", name, "--model", models / name, "--judge", models / family.judge]
        given += ["--num_prompts", 2, "--repetitions", 1, "--warmup", 0, "--threads", 1]
        given += ["--output_dir", tmp_path / "out", *arguments]
        return run_study("compare", *given)

    return run


COMPARISON = (
    "--num_inference_steps",
    STEPS,
    "--cache_methods",
    "Fast",
    "--rel_l1_thresh",
    9,
    "--ode_reference",
)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("pixart", (3, 64, 64), "prompt"),
        ("dit", (3, 64, 64), "class_label"),
        ("opensora", (16, 3, 64, 64), "prompt"),
        ("wan", (17, 3, 64, 64), "prompt"),
    ],
)
def test_a_comparison_of_every_family(command, tmp_path, name, shape, text):
    assert command(name, *COMPARISON) == 0
    out, family = tmp_path / "out", FAMILIES[name]
    document = json.loads((out / "results.json").read_text())
    assert document["settings"]["guidance_scale"] == family.guidance_scale
    assert [set(entry) for entry in document["prompts"]] == [{text, "seed"}] * 2
    uncached, fast, *fewer = document["results"]
    assert uncached["solver"] == fast["solver"] == family.solvers[0]
    assert 0 < fast["compute_fraction"] < 1
    assert {row["solver"] for row in fewer} == set(family.solvers)
    assert all(row["cache_method"] == f"{row['solver']}, fewer steps" for row in fewer)
    for row in document["results"]:
        assert row["psnr_ode_db"]["mean"] > 0
        assert row["judge_distance"] >= 0 and 0 <= row["prompt_accuracy"] <= 1
    report = (out / "report.md").read_text()
    assert f"({family.solvers[0]}) and by {family.solvers[1]}" in report
    kept = [load_file(file)["pictures"] for file in (out / "references").iterdir()]
    assert [tuple(pictures.shape) for pictures in kept] == [(2, *shape)] * 2
    clips = len(shape) == 4
    assert ("temporal PSNR dB" in report) == clips == ("temporal_psnr_db" in fast)
    with Image.open(out / "pictures" / fast["key"] / "001.png") as picture:
        assert picture.size == (64, 64)
        assert getattr(picture, "n_frames", 1) == (shape[0] if clips else 1)


def test_guidance_above_1_doubles_the_batch_and_1_does_not(models):
    given = read_settings(["--model_type", "dit", "--model", str(models / "dit")])
    pipe, sizes = loading.load_pipeline(given), []
    pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for scale in (3.0, 1.0):
        own = replace(given, guidance_scale=scale)
        pipe(**loading.call_arguments(own, pipe, "red circle"), num_inference_steps=1)
    assert sizes == [2, 1]


def test_wan_is_guided_in_a_second_call(models):
    given = read_settings(["--model_type", "wan", "--model", str(models / "wan")])
    pipe, sizes = loading.load_pipeline(given), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for scale in (5.0, 1.0):
        own = replace(given, guidance_scale=scale)
        pipe(**loading.call_arguments(own, pipe, "a circle"), num_inference_steps=1)
    assert sizes == [1, 1, 1]


def test_a_class_name_that_the_pipeline_does_not_know_is_named(command, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"test": [{"class_label": "red cat", "seed": 1}] * 2}))
    assert command("dit", "--prompts", prompts) == 2
    assert (
        "unknown class_label 'red cat'; accepted: blue circle, blue cross"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_enabled_on_the_model_is_said_before_anything_is_written(
    command, tmp_path, capsys
):
    assert command("dit", "--cache_methods", "Schedule") == 2
    assert "Schedule: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_entries_must_have_the_familys_own_text(command, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"test": [{"prompt": "a red circle", "seed": 1}]}))
    assert command("dit", "--prompts", prompts) == 2
    assert 'list of {"class_label": text, "seed": number}' in capsys.readouterr().err


def test_a_scheduler_that_would_make_the_rows_names_untrue_is_refused(models, tmp_path):
    pipe = loading.load_pipeline(
        read_settings(["--model_type", "dit", "--model", str(models / "dit")])
    )
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "other")
    given = read_settings(["--model_type", "dit", "--model", str(tmp_path / "other")])
    with pytest.raises(BenchmarkError, match="samples with DDPMScheduler; accepted for dit: DDIM"):
        loading.load_pipeline(given)


@pytest.mark.parametrize("name", TINY)
def test_the_pipelines_schedulers_are_what_the_families_say(models, name):
    given = read_settings(["--model_type", name, "--model", str(models / name)])
    pipe = loading.load_pipeline(given)
    assert own_solver(pipe.scheduler) == FAMILIES[name].solvers[0]
    assert loading.picture_shape(given, pipe) == (64, 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_files_and_defaults_are_the_familys_own(name):
    given = read_settings(["--model_type", name])
    loading.load_documented(given)
    assert given.num_inference_steps == (FAMILIES[name].steps,)
    assert given.guidance_scale == FAMILIES[name].guidance_scale
    assert given.judge.endswith(FAMILIES[name].judge)
    texts = [loading.entry_text(entry) for entry in loading.load_prompts(given)]
    FAMILIES[name].judging().check_texts(texts)


def test_a_configuration_file_of_another_family_is_refused():
    config = str(settings.ROOT / "configs" / "dit.yaml")
    given = read_settings(["--model_type", "pixart", "--config", config])
    with pytest.raises(BenchmarkError, match="family 'dit', but --model_type is 'pixart'"):
        loading.load_documented(given)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("flux", ("--guidance_scale", "3"), "--guidance_scale: flux has none; it is for pixart"),
        ("dit", ("--true_cfg_scale", "3"), "--true_cfg_scale: dit takes --guidance_scale"),
        ("dit", ("--guidance_scale", "0.5"), "at least 1"),
        ("dit", ("--height", "128"), "--height: dit makes pictures of its own size"),
        ("pixart", ("--num_frames", "16"), "--num_frames: pixart has none; it is for opensora"),
        ("opensora", ("--num_frames", "1"), "at least 2"),
        ("opensora", ("--inception_weights", "x"), "--inception_weights: it is for pictures"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(name, arguments, named):
    with pytest.raises(BenchmarkError, match=named):
        read_settings(["--model_type", name, *arguments])


@pytest.mark.parametrize(("name", "frames"), [("opensora", 16), ("wan", 17)])
def test_real_clips_are_of_the_judged_shape(monkeypatch, name, frames):
    monkeypatch.setattr(judging, "REAL_CLIPS", 3)
    judged = FAMILIES[name].judging()
    drawn = list(judged.real(torch.Generator().manual_seed(0)))
    assert [tuple(batch.shape) for batch in drawn] == [(3, frames, 3, 64, 64)]
    assert judged.shape == (frames, 3, 64, 64)
