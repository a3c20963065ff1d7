"""Shared fixtures: a tiny FLUX transformer and a sampler that calls it as the pipeline does."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family

HOST_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


def pytest_collection_modifyitems(items):
    """What is ``one_of_a_kind`` runs on such pipelines alone."""
    marked = {item for item in items if item.get_closest_marker("one_of_a_kind")}
    if marked:
        from tests.pipelines import ONE_OF_A_KIND

        left_out = {item for item in marked if item.callspec.params["case"] not in ONE_OF_A_KIND}
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def own_registry(monkeypatch):
    """Families registered in the test are forgotten after it."""
    monkeypatch.setattr(family, "_FAMILIES", dict(family._families()))
    return family


@pytest.fixture
def transformer():
    return make_tiny_flux()


@pytest.fixture
def sampler(transformer):
    return FluxSampler(transformer)


@pytest.fixture
def host_reads(monkeypatch):
    """Names of all tensor methods called that make the host wait for the device."""
    reads = []

    def counted(name, original):
        def read(tensor, *args, **kwargs):
            reads.append(name)
            return original(tensor, *args, **kwargs)

        return read

    for name in HOST_READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return reads
