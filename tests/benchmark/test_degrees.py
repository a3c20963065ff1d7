"""Degrees of parallelism on the benchmark's command line."""

import pytest

from benchmark.errors import BenchmarkError
from tests.benchmark.tiny import read_settings
from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import Degrees


@pytest.mark.parametrize(
    "arguments, processes, needed",
    [
        (["--ulysses_degree", "2"], 1, 2),
        (["--ring_degree", "2", "--use_cfg_parallel"], 2, 4),
        ([], 2, 1),
    ],
)
def test_degrees_must_fit_the_processes(monkeypatch, arguments, processes, needed):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(BenchmarkError, match=f"torchrun --nproc_per_node {needed}"):
        read_settings(arguments)


def test_degrees_reach_the_settings_by_xfusers_names(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    settings = read_settings(["--pipefusion_parallel_degree", "2", "--data_parallel_degree", "4"])
    assert Degrees(**settings.degrees).world_size == 8
    monkeypatch.delenv("WORLD_SIZE")
    assert read_settings([]).degrees == {}
