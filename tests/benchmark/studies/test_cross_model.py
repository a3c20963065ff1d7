"""The table over model families: its rows and figures, its command, and its place in the docs."""

import json

import pytest

from benchmark.errors import BenchmarkError
from benchmark.report.markers import END, PAGE
from benchmark.settings import ROOT
from benchmark.studies import compare, cross_report
from benchmark.studies.catalogue import RESULTS
from tests.benchmark.tiny import run_study

MARKERS = (f"<!-- {cross_report.MARKER} -->", END)
HEAD = "| family | method | judge distance | FPS | speedup | HR | compute | PSNR dB | SSIM |"


def result(name, compute, psnr, *, steps=None, solver="Euler", **changes):
    """A row as ``results.json`` has it; ``steps`` makes it one of fewer steps."""
    cached = steps is None and name != "None"
    return {
        "cache_method": name,
        "reference_steps": 20,
        "num_inference_steps": steps or 20,
        "solver": solver,
        "config": {"use_cache": name} if cached else None,
        "judge_distance": 1470.126,
        "fps": 2 / compute,
        "speedup": 1 / compute,
        "hit_rate": 1 - compute if cached else 0.0,
        "compute_fraction": compute,
        "psnr_db": psnr and {"mean": psnr, "std": 2.0, "min": 30.0},
        "ssim": psnr and 0.98765,
        "prompt_accuracy": 0.9375,
        "prompt_accuracy_error": 0.01,
        **changes,
    }


def document(results, **settings):
    return {
        "settings": {
            "model": "benchmark/pipelines/flux",
            "config": "configs/small/flux.yaml",
            "width": 64,
            "height": 32,
            "dtype": "float32",
            "split": "test",
            "repetitions": 3,
            "warmup": 1,
            "num_inference_steps": [20],
            **settings,
        },
        "distance": "Fréchet distance of features",
        "environment": {"torch": "2.13", "threads": 2},
        "prompts": [{"prompt": "a red circle", "seed": 1}] * 16,
        "results": results,
    }


PICTURES = [
    result("None", 1.0, None),
    result("Fb", 0.5, 40.25),
    result("Fb+AdaCorrection", 0.4, 52.34),
    result("Auto", 0.25, 58.06),
    result("Euler, fewer steps", 0.5, 44.0, steps=10),
    result("Euler, fewer steps", 0.3, 41.04, steps=6),
    result("Euler, fewer steps", 0.15, 30.0, steps=3),
    result("DPM-Solver++, fewer steps", 0.2, 43.0, steps=4, solver="DPM-Solver++"),
]


def clip(name, compute, temporal):
    mean = temporal and {"mean": temporal, "std": 1.0, "min": 40.0}
    return result(name, compute, temporal and 35.0, temporal_psnr_db=mean)


def table_of(**documents):
    return cross_report.make_table(documents)


def test_the_table_has_a_family_below_the_other_with_fewer_steps_at_autos_compute():
    table = table_of(
        flux=document(PICTURES), dit=document([result("None", 1.0, None), result("Fb", 0.5, 33.33)])
    )
    assert table.markdown() == (
        f"{HEAD} prompt accuracy |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| flux, 20 steps | uncached | 1470.13 | 2.000 | 1.00x | 0.000 | 1.000 | - | - | 0.938 |\n"
        "|  | Fb | 1470.13 | 4.000 | 2.00x | 0.500 | 0.500 | 40.2 | 0.9877 | 0.938 |\n"
        "|  | Fb+AdaCorrection | 1470.13 | 5.000 | 2.50x | 0.600 | 0.400 | 52.3 | 0.9877 "
        "| 0.938 |\n"
        "|  | Auto | 1470.13 | 8.000 | 4.00x | 0.750 | 0.250 | 58.1 | 0.9877 | 0.938 |\n"
        "|  | Euler, 6 steps | 1470.13 | 6.667 | 3.33x | 0.000 | 0.300 | 41.0 | 0.9877 | 0.938 |\n"
        "|  | DPM-Solver++, 4 steps | 1470.13 | 10.000 | 5.00x | 0.000 | 0.200 | 43.0 | 0.9877 "
        "| 0.938 |\n"
        "| dit, 20 steps | uncached | 1470.13 | 2.000 | 1.00x | 0.000 | 1.000 | - | - | 0.938 |\n"
        "|  | Fb | 1470.13 | 4.000 | 2.00x | 0.500 | 0.500 | 33.3 | 0.9877 | 0.938 |\n"
    )


def test_clips_add_their_temporal_consistency():
    clips = document([clip("None", 1.0, None), clip("Ada", 0.5, 51.27)])
    table = table_of(flux=document(PICTURES[:2]), opensora=clips)
    assert table.heads[-2:] == ("temporal PSNR dB", "prompt accuracy")
    assert [line[-2] for line in table.cells] == ["-", "-", "-", "51.3"]


def test_the_report_says_how_it_was_measured_and_what_can_be_compared(tmp_path):
    content = {"flux": document(PICTURES), "opensora": document([clip("None", 1.0, None)])}
    table = cross_report.write_report(tmp_path, content)
    report = (tmp_path / "cross_model.md").read_text()
    assert table.markdown() in report
    for text in (
        "16 pictures of 64x32 pixels of the test split, 20 steps",
        "16 clips of 64x32 pixels",
        "the options of `configs/small/flux.yaml`, `configs/small/flux.yaml`;",
        "comparable within a family, not from one family to another",
        "Fréchet distance of features",
        "Temporal PSNR",
        "[opensora/report.md](opensora/report.md)",
    ):
        assert text in report
    assert (tmp_path / "psnr.png").read_bytes().startswith(b"\x89PNG")


def write_results(folder):
    (folder / "flux").mkdir()
    (folder / "flux" / "results.json").write_text(json.dumps(document(PICTURES)))


def test_the_page_gets_the_table_between_its_markers_again_and_again(tmp_path):
    write_results(tmp_path)
    start, end = MARKERS
    page = tmp_path / "results.md"
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    for _ in range(2):
        cross_report.update_results(page, tmp_path)
        table = table_of(flux=document(PICTURES)).markdown()
        assert page.read_text() == f"before\n{start}\n\n{table}\n{end}\nafter\n"


@pytest.mark.parametrize("order", [(), (0,), (1, 0), (0, 0, 1)])
def test_a_page_with_other_markers_stays_as_it_is(tmp_path, order):
    write_results(tmp_path)
    page = tmp_path / "results.md"
    page.write_text("\n".join(MARKERS[index] for index in order))
    before = page.read_text()
    with pytest.raises(BenchmarkError, match="--update_results: .* once"):
        cross_report.update_results(page, tmp_path)
    assert page.read_text() == before


def test_the_page_has_a_place_for_the_table_and_the_one_that_is_committed(tmp_path):
    copy, committed = tmp_path / "results.md", RESULTS / "cross_model"
    text = PAGE.read_text("utf-8")
    copy.write_text(text, "utf-8")
    cross_report.update_results(copy, committed)
    assert copy.read_text("utf-8") == text
    assert text.count(MARKERS[0]) == 1


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with a stand-in for the families' runs; gives exit code and settings."""
    (tmp_path / "pipelines" / "flux").mkdir(parents=True)
    ran = []

    def execute(settings, console):
        ran.append(settings)
        (settings.output_dir / "rows").mkdir(parents=True, exist_ok=True)
        (settings.output_dir / "rows" / "settings.json").write_text("{}")
        (settings.output_dir / "results.json").write_text(json.dumps(document(PICTURES)))

    monkeypatch.setattr(compare, "run", execute)

    def run(*arguments):
        given = ["--pipelines", tmp_path / "pipelines", "--output_dir", tmp_path / "out"]
        ran.clear()
        return run_study("cross_model", *given, *arguments), ran

    return run


def test_the_command_runs_the_shipped_families_and_writes_the_table(command, tmp_path, capsys):
    code, ran = command("--num_prompts", 4, "--repetitions", 2, "--threads", 1)
    assert code == 0
    (settings,) = ran
    assert (settings.model_type, settings.mode, settings.split) == ("flux", "comparison", "test")
    assert settings.cache_methods == (
        "None", "Fb", "Fb+AdaCorrection", "Tea", "Tea+AdaCorrection", "Fast",
        "Fast+AdaCorrection", "Ada", "Ada+AdaCorrection", "Auto", "Auto, learn=1",
    )  # fmt: skip
    assert (settings.num_prompts, settings.repetitions, settings.threads) == (4, 2, 1)
    assert settings.output_dir == tmp_path / "out" / "flux"
    assert settings.config == str(ROOT / "configs" / "small" / "flux.yaml")
    assert not settings.resume
    assert "Fb+AdaCorrection" in capsys.readouterr().out
    assert (tmp_path / "out" / "cross_model.md").is_file()


def test_a_family_that_was_begun_is_resumed_and_any_other_is_begun(command, tmp_path):
    code, ran = command("--resume")
    assert (code, ran[0].resume) == (0, False)
    code, ran = command("--resume")
    assert (code, ran[0].resume) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--families", "dalle"), "--families must be one of flux, pixart, dit, opensora"),
        (("--num_prompts", "many"), "--num_prompts: invalid int value"),
        (("--num_prompts", "-2"), "--num_prompts must be at least 1, got -2"),
        (("--num_prompts", "65"), "--num_prompts 65: the test split has 64 prompts"),
        (
            ("--cache_methods", "Fbx"),
            "of a cache method; accepted: None, Fb",
        ),
        (("--pipelines", "nowhere"), "--families: no pipeline of any family in nowhere"),
        (("--families", "flux", "--pipelines", "nowhere"), "--families: no pipeline of flux in"),
        (("--model", "x"), "unrecognized arguments: --model"),
        (("--update_results",), "there is no FAMILY/results.json in"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_run(command, capfd, arguments, named):
    code, ran = command(*arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert (code, ran) == (2, [])
    assert named in line


def test_a_directory_in_use_is_not_written_over(command, capfd):
    assert command()[0] == 0
    code, ran = command()
    assert (code, ran) == (2, [])
    assert "--output_dir" in capfd.readouterr().err
