"""Shared fixtures: a tiny FLUX transformer and a sampler that calls it as the pipeline does."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family as registry


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def own_registry(monkeypatch):
    """Families registered in the test are forgotten after it."""
    known = dict(registry._families())
    monkeypatch.setattr(registry, "_FAMILIES", known)
    return registry


@pytest.fixture
def transformer():
    return make_tiny_flux()


@pytest.fixture
def sampler(transformer):
    return FluxSampler(transformer)
