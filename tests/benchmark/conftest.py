"""A tiny pipeline on disk, shared by the studies' tests."""

import pytest
import torch

from benchmark.score import judging
from benchmark.small.judge import Judge, save_judge
from tests.benchmark.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a tiny random pipeline and an untrained judge."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "flux")
    torch.manual_seed(1)
    save_judge(Judge().eval(), folder / "judge")
    return folder


@pytest.fixture(autouse=True)
def few_real_pictures(monkeypatch):
    """Drawing and judging all of them takes longer than a tiny pipeline's whole run."""
    monkeypatch.setattr(judging, "REAL_PICTURES", 8)
    monkeypatch.setattr(judging, "REAL_CLIPS", 4)
