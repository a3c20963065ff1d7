"""The scripts that fit methods to a family, on tiny pipelines that guide in a doubled batch."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmark.tiny import TINY
from xfuser_adacorr.model_executor.cache.calibration.ada import load_ada_codebook
from xfuser_adacorr.model_executor.cache.calibration.fast import load_fast_maps
from xfuser_adacorr.model_executor.cache.calibration.tea import load_tea_polynomial

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROMPTS = {
    "dit": [{"class_label": "red circle", "seed": 1}, {"class_label": "blue square", "seed": 2}],
    "pixart": [{"prompt": "a red circle", "seed": 1}, {"prompt": "a blue square", "seed": 2}],
    "opensora": [{"prompt": "a red circle moves left", "seed": s} for s in (1, 2)],
}


@pytest.fixture
def calibrate(monkeypatch, tmp_path):
    """Runs a script on a family's tiny pipeline; returns the pipeline and the file written."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(script, family, *options):
        torch.manual_seed(0)
        pipe, transformer = TINY[family]()
        pipe.register_modules(transformer=transformer)
        pipe.save_pretrained(tmp_path / family)
        prompts = tmp_path / "prompts.json"
        prompts.write_text(json.dumps({"development": PROMPTS[family]}))
        given = {"model_type": family, "model": tmp_path / family, "prompts": prompts}
        given |= {"num_prompts": 2, "output": tmp_path / "file"}
        arguments = [str(x) for key, value in given.items() for x in (f"--{key}", value)]
        for name in ("calibrate", script):
            monkeypatch.delitem(sys.modules, name, raising=False)
        arguments += map(str, options)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        importlib.import_module(script).main()
        # The files are bound to the model by fingerprint.
        return type(pipe).from_pretrained(tmp_path / family), tmp_path / "file"

    return run


def test_codebook_of_a_guided_family(calibrate):
    options = ("Ada", "--num_inference_steps", 9, "--rates", 3, 2, 1, "--guidance_scale", 2)
    pipe, path = calibrate("calibrate", "pixart", *options)
    codebook = load_ada_codebook(pipe.transformer, str(path))
    assert [rate for _, rate in codebook.entries] == [3, 2, 1]
    expected = {
        "num_prompts": 2,
        "num_inference_steps": 9,
        "compute_fraction": 0.5,
        "height": 64,
        "width": 64,
        "guidance_scale": 2.0,
    }
    assert json.loads(path.read_text())["settings"].items() >= expected.items()


def test_guidance_and_frames_are_the_familys_if_not_given(calibrate):
    pipe, path = calibrate("calibrate", "opensora", "Tea", "--num_inference_steps", 4)
    polynomial = load_tea_polynomial(pipe.transformer, str(path))
    assert len(polynomial.coefficients) == 5 and all(map(math.isfinite, polynomial.coefficients))
    settings = json.loads(path.read_text())["settings"]
    assert (settings["guidance_scale"], settings["num_frames"]) == (3.0, 16)


def test_maps_of_a_pipeline_that_gives_no_latents(calibrate):
    pipe, path = calibrate("calibrate", "dit", "Fast", "--num_inference_steps", 4)
    maps = load_fast_maps(pipe.transformer, str(path))
    assert maps["stack.hidden_states.weight"].shape == (24, 24)
    assert len(maps) == 2 * (3 + 1), "weight and bias of 3 blocks and of the stack"


@pytest.mark.parametrize("family", ["dit", "opensora"])  # by pictures, by latents
def test_a_schedule_is_searched_with_guidance(calibrate, family):
    options = ("--num_inference_steps", 6, "--computed_steps", 3, "--max_evaluations", 3)
    _, path = calibrate("search_schedule", family, *options)
    stored = json.loads(path.read_text())
    assert stored["budget"] == len(stored["refreshed"]) == 3
    assert stored["settings"]["guidance_scale"] == 3.0
    assert math.isfinite(stored["score_db"])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("dit", ("--height", 32), "--height: dit makes pictures of its own size alone"),
        ("pixart", ("--num_prompts", 3), "the development split has 2 prompts"),
        ("pixart", ("--output", "nowhere/file"), "there is no directory nowhere"),
        ("pixart", ("--rates", 3, 2, 1), "rates is an option of Ada, not of Tea"),
    ],
)
def test_mistakes_end_a_script_before_any_run(calibrate, capsys, family, options, message):
    with pytest.raises(SystemExit) as stopped:
        calibrate("calibrate", family, "Tea", *options)
    assert message in f"{stopped.value}{capsys.readouterr().err}"
