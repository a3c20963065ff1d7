"""The output directory: whole files, kept rows, and resuming."""

import pytest
import torch

from benchmark.errors import BenchmarkError
from benchmark.run.store import Store, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_remnant(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_kept_row_comes_back(tmp_path):
    store = Store(tmp_path)
    assert store.row("50-fb") is None
    store.save_row("50-fb", {"psnr_db": {"mean": 40.5}})
    assert store.row("50-fb") == {"psnr_db": {"mean": 40.5}}


def test_reference_pictures_come_back_bit_for_bit(tmp_path):
    pictures = torch.rand(2, 3, 8, 8)
    Store(tmp_path).save_pictures("50-none", pictures)
    assert torch.equal(Store(tmp_path).pictures("50-none"), pictures)


def test_checking_writes_nothing(tmp_path):
    Store(tmp_path / "new" / "deep").check(resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_results_is_not_written_over(tmp_path):
    write_text(tmp_path / "report.md", "precious")
    with pytest.raises(BenchmarkError, match="not empty; choose another directory, or --resume"):
        Store(tmp_path).check(resume=False)


def test_a_directory_below_a_file_cannot_be_written(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(BenchmarkError, match="cannot be written"):
        Store(tmp_path / "file" / "out").check(resume=False)


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(BenchmarkError, match="holds no interrupted run"):
        Store(tmp_path / "none").check(resume=True)


def test_resuming_with_the_same_settings_clears_unfinished_files(tmp_path):
    store = Store(tmp_path)
    store.open({"split": "test", "steps": (28,)}, resume=False)
    remnant = tmp_path / "rows" / ".unfinished-x.json"
    remnant.write_text("{")
    store.open({"split": "test", "steps": (28,)}, resume=True)
    assert not remnant.exists()


def test_resuming_with_another_setting_names_it(tmp_path):
    store = Store(tmp_path)
    store.open({"split": "test", "steps": 28}, resume=False)
    with pytest.raises(BenchmarkError, match="split was 'test' .* is 'development' now"):
        store.open({"split": "development", "steps": 28}, resume=True)
