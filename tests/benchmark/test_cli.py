"""The command of all studies: what it lists, what it reads, and the files that it needs."""

import subprocess
import sys

import pytest

from benchmark import cli
from benchmark.errors import BenchmarkError
from benchmark.settings import ROOT, Settings
from benchmark.studies.catalogue import RESULTS, STUDIES


def test_help_lists_every_study_with_its_question(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for study in STUDIES.values():
        assert study.name in listed and study.question in listed


def test_an_unknown_study_is_told_the_known_ones(capsys):
    assert cli.main(["paretto"]) == 2
    assert "no study 'paretto'; accepted: compare, pareto" in capsys.readouterr().err


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_can_be_imported_and_takes_known_settings(study):
    assert set(study.takes) <= set(Settings.__slots__)
    assert set(study.defaults) <= set(Settings.__slots__)
    assert "usage: python -m benchmark " + study.name in cli.make_parser(study).format_help()


def test_a_studys_own_defaults_stand_where_nothing_else_is_given():
    settings, options = cli.read(STUDIES["ablations"], ["--compute_fractions", "0.5"])
    assert (settings.split, settings.num_prompts) == ("development", 6)
    assert settings.output_dir == RESULTS / "ablations" / "flux_28"
    assert options.compute_fractions == (0.5,)
    settings, _ = cli.read(STUDIES["ablations"], ["--model_type", "dit", "--num_prompts", "2"])
    assert settings.num_prompts == 2 and settings.output_dir == RESULTS / "ablations" / "dit_50"


def test_settings_made_in_python_are_checked_as_those_of_the_command_line(tmp_path):
    settings = Settings(model_type="pixart", num_inference_steps=(20, 20), output_dir=tmp_path)
    assert settings.num_inference_steps == (20,) and settings.guidance_scale == 3.0
    with pytest.raises(BenchmarkError, match="--repetitions must be at least 1, got 0"):
        Settings(repetitions=0, output_dir=tmp_path)


def test_a_correction_of_strength_0_is_given_on(tmp_path):
    settings = Settings(adacorr_gamma=0.0, schedule=(3,), output_dir=tmp_path)
    assert settings.cache_options == {"adacorr_gamma": 0.0, "schedule": 3}
    assert settings.to_dict()["cache_options"] == settings.cache_options


def test_the_kept_command_answers_from_any_directory(tmp_path):
    script = ROOT / "benchmark" / "cache_execute.py"
    command = [sys.executable, str(script), "--num_inference_steps", "3"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr == "error: --num_inference_steps must be at least 4, got 3\n"
