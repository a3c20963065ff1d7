"""`python -m xfuser_adacorr`: a learned plan for any pipeline, from the command line."""

import json
import os
import socket
import sys
from multiprocessing import get_context

import pytest
import torch

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


def run_rank(rank, port, load, given, said):
    """The command in a process of its own, as torchrun starts it."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    command.load = load
    with open(said, "w") as sys.stdout:
        sys.stderr = sys.stdout
        code = command.main([str(each) for each in given])
        sys.stdout.flush()
    os._exit(code)


def on_two_processes(load, given, folder):
    """Exit code and words of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = [folder / f"rank{rank}" for rank in range(2)]
    context = get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(rank, port, load, given, said[rank]))
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    return [(each.exitcode, path.read_text()) for each, path in zip(ranks, said, strict=True)]


@pytest.fixture
def command_of_seven(tmp_path):
    """Six prompts are fitted on, three by each process."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"label": [label % 4]} for label in range(7)]))
    given = ["somewhere", prompts, "--num_inference_steps", STEPS, "--budgets", 0.25, 0.5]
    return [*given, "--search_evaluations", 3, "--held_out", 1, "--output"]


def test_processes_divide_the_prompts_and_write_one_plan(command_of_seven, tmp_path, monkeypatch):
    pipe = Loop(SAMPLERS["flow"]())
    monkeypatch.setattr(command, "load", lambda *arguments: pipe)
    whole, output = tmp_path / "whole.json", tmp_path / "plan.json"
    assert command.main([str(each) for each in [*command_of_seven, whole]]) == 0
    calls = pipe.transformer.calls

    class Counted(Loop):
        def __call__(self, *arguments, **named):
            try:
                return super().__call__(*arguments, **named)
            finally:
                count = tmp_path / f"calls{os.environ['RANK']}"
                count.write_text(str(self.transformer.calls))

    found = on_two_processes(
        lambda *arguments: Counted(SAMPLERS["flow"]()), [*command_of_seven, output], tmp_path
    )
    assert [code for code, _ in found] == [0, 0]
    assert "wrote" in found[0][1] and "wrote" not in found[1][1]
    (plan,), (expected,) = PlanFile.load(output).plans, PlanFile.load(whole).plans
    for mine, one in zip(plan.courses, expected.courses, strict=True):
        assert mine.steps == one.steps and mine.measured_on == 1
        assert sum(mine.coefficients, ()) == pytest.approx(sum(one.coefficients, ()), abs=1e-9)
        assert mine.psnr_db == pytest.approx(one.psnr_db, abs=1e-6)
    assert plan.settings == expected.settings
    made = [int((tmp_path / f"calls{rank}").read_text()) for rank in range(2)]
    assert sum(made) == calls and max(made) < 0.65 * calls
    assert not [each for each in tmp_path.iterdir() if each.suffix in (".tmp", ".checkpoint")]


def test_processes_end_with_the_same_error(command_of_seven, tmp_path):
    def broken(*arguments):
        pipe = Loop(SAMPLERS["flow"]())
        with torch.no_grad():
            pipe.transformer.a[3] = float("nan")
        return pipe

    found = on_two_processes(broken, [*command_of_seven, tmp_path / "plan.json"], tmp_path)
    for code, said in found:
        assert code == 1 and "error: prompts: the uncached latents of call 3, sample 0" in said
    nowhere = command_of_seven[1] / "plan.json"  # below a file
    sound = lambda *arguments: Loop(SAMPLERS["flow"]())  # noqa: E731
    for code, said in on_two_processes(sound, [*command_of_seven, nowhere], tmp_path):
        assert code == 1 and f"error: output: {nowhere}.checkpoint could not be written" in said
    assert not (tmp_path / "plan.json").exists()


def test_prompts_are_lines_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n two dogs \n")
    assert command.read_prompts(tmp_path / "prompts.txt") == ["a cat", "two dogs"]
