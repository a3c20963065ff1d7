"""Shared fixtures: a tiny FLUX transformer and a sampler that calls it as the pipeline does."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def transformer():
    return make_tiny_flux()


@pytest.fixture
def sampler(transformer):
    return FluxSampler(transformer)
