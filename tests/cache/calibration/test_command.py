"""`python -m xfuser_adacorr`: a learned plan for any pipeline, from the command line."""

import json

import pytest

import xfuser_adacorr.__main__ as command
from tests.cache.methods.test_learned import SAMPLERS, STEPS, Loop
from xfuser_adacorr.model_executor.cache.calibration.plan_file import PlanFile


@pytest.fixture
def run(tmp_path, monkeypatch):
    loaded = []

    def load(*arguments):
        loaded.append(arguments)
        return Loop(SAMPLERS["flow"]())

    monkeypatch.setattr(command, "load", load)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"label": [label]} for label in range(3)]))

    def run(*arguments, prompts=prompts):
        given = ("somewhere", prompts, "--num_inference_steps", STEPS, *arguments)
        return command.main([str(each) for each in given]), loaded

    return run


def test_a_plan_is_written(run, tmp_path, capsys):
    output = tmp_path / "plan.json"
    given = ("--output", output, "--budgets", 0.25, "--search_evaluations", 1)
    code, loaded = run(*given, "--call", "guidance_scale=2.5", "--held_out", 1)
    assert code == 0 and loaded == [("somewhere", "bfloat16", None)]
    (plan,) = PlanFile.load(output).plans
    assert (plan.guidance_scale, plan.num_steps, len(plan.courses[0].steps)) == (2.5, STEPS, 3)
    assert str(output) in capsys.readouterr().out


def test_a_plan_is_measured_anew(run, tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert run("--output", output, "--budgets", 0.25, "--search_evaluations", 1)[0] == 0
    before = PlanFile.load(output).plans[0]
    assert run("--output", output, "--measure", "--seed", 5)[0] == 0
    (plan,) = PlanFile.load(output).plans
    assert plan.courses[0].measured_on == 3 and plan.courses[0].steps == before.courses[0].steps
    assert plan.courses[0].psnr_db != before.courses[0].psnr_db  # of other noise
    capsys.readouterr()
    assert run("--output", output, "--measure", "--budgets", 0.5)[0] == 1
    assert "--budgets is of a calibration" in capsys.readouterr().err


def test_mistakes_are_one_line(run, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[3]")
    cases = [
        ({"prompts": tmp_path / "none.txt"}, (), "prompts: no file"),
        ({"prompts": tmp_path / "bad.json"}, (), "must be a list of texts"),
        ({}, ("--budgets", 1.5, "--output", tmp_path), "budgets must be"),
        ({}, (), "output must be given"),
    ]
    for prompts, given, message in cases:
        assert run(*given, **prompts)[0] == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    with pytest.raises(SystemExit):
        run("--call", "guidance")
    assert "must be NAME=VALUE" in capsys.readouterr().err


def test_prompts_are_lines_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n two dogs \n")
    assert command.read_prompts(tmp_path / "prompts.txt") == ["a cat", "two dogs"]
