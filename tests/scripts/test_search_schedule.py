"""The schedule search's script on a tiny pipeline."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmark.tiny import tiny_pipeline
from xfuser_adacorr import CacheConfig, cache_summary, enable_cache
from xfuser_adacorr.model_executor.cache.calibration.stored_schedule import load_schedule

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Runs ``search_schedule.py`` on a tiny pipeline; returns the file it wrote."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("calibrate", "search_schedule"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import search_schedule

    tiny_pipeline().save_pretrained(tmp_path / "model")
    prompts = [{"prompt": "a red circle", "seed": 1}, {"prompt": "a blue square", "seed": 2}]
    (tmp_path / "prompts.json").write_text(json.dumps({"development": prompts}))

    def run(name, *options):
        output = tmp_path / f"{name}.json"
        given = {"model": tmp_path / "model", "prompts": tmp_path / "prompts.json"}
        given |= {"output": output, "num_inference_steps": 6, "height": 32, "width": 32}
        given |= {"num_prompts": 2}
        arguments = [str(x) for key, value in given.items() for x in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["search_schedule.py", *arguments, *options])
        search_schedule.main()
        return json.loads(output.read_text())

    run.script = search_schedule
    return run


def test_search_script_stores_what_schedule_reads_and_resumes(search, monkeypatch, tmp_path):
    whole = search("whole", "--computed_steps", "3", "--max_evaluations", "6")
    assert (whole["budget"], whole["num_steps"], whole["stand_in"]) == (3, 6, "adacorrection")
    assert whole["settings"]["evaluations"] <= 6 and not list(tmp_path.glob("*.progress.json"))

    score, calls = search.script.LatentsScore.__call__, []

    def interrupted(self, steps):
        calls.append(steps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, steps)

    monkeypatch.setattr(search.script.LatentsScore, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search("again", "--computed_steps", "3", "--max_evaluations", "6")
    assert len(json.loads((tmp_path / "again.progress.json").read_text())["scores"]) == 3
    with pytest.raises(SystemExit, match="is of another search"):
        search("again", "--computed_steps", "3", "--max_evaluations", "7")
    assert search("again", "--computed_steps", "3", "--max_evaluations", "6") == whole
    assert len(calls) == len(set(calls)) + 1, "only the interrupted evaluation is repeated"

    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tmp_path / "model")
    stored = load_schedule(pipe.transformer, str(tmp_path / "whole.json"), "adacorrection")
    assert list(stored.refreshed) == whole["refreshed"]
    config = CacheConfig(
        use_cache="Schedule",
        enable_adacorrection=True,
        calibration=str(tmp_path / "whole.json"),
    )
    enable_cache(pipe, config)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a red circle",
        num_inference_steps=6,
        height=32,
        width=32,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    )
    calls = cache_summary(pipe).trace.calls
    assert [call.step_index for call in calls if call.refreshed] == whole["refreshed"]


def test_search_script_refuses_a_budget_that_the_run_has_not(search):
    for option, value in (("--computed_steps", "7"), ("--compute_fraction", "0.1")):
        with pytest.raises(SystemExit, match="computed steps of 6; from 2 to 6 are accepted"):
            search("x", option, value)
