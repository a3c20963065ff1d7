"""A calibration beside a model that is no longer the calibrated one is left aside, once said."""

import logging
import warnings

import pytest
import torch
from diffusers import FluxPipeline

from benchmark.settings import PIPELINES
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, TeaPolynomial, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.calibration.files import model_fingerprint
from xfuser_adacorr.model_executor.cache.calibration.tea import save_tea_polynomial
from xfuser_adacorr.model_executor.cache.messages import warn_once


@pytest.fixture(autouse=True)
def unsaid():
    warn_once.cache_clear()


def tuned(model):
    model.proj_out.weight.mul_(1.01)


def fused(model):
    model.fuse_qkv_projections()


def stored_in_fp8(model):
    model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=["pos"]
    )


CHANGES = [tuned, fused, stored_in_fp8]


@pytest.mark.parametrize("change", CHANGES)
def test_a_calibration_that_fits_no_longer_is_left_aside(tmp_path, caplog, change):
    model = make_tiny_flux()
    polynomial = TeaPolynomial(coefficients=(1.0, 2.0), domain=(0.0, 0.5))
    save_tea_polynomial(tmp_path / "teacache.json", polynomial, model, {})
    model.register_to_config(_name_or_path=str(tmp_path))
    sampler = FluxSampler(model)
    change(model)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            enable_cache(model, "Tea", rel_l1_thresh=0.3, scheduler=sampler.scheduler)
        assert sampler.run(6, finish=False).isfinite().all()
        disable_cache(model)
    told = [r.message for r in caplog.records if "made for another model" in r.message]
    assert len(told) == 1 and "is left aside" in told[0]


@pytest.mark.parametrize("name", ["Auto", "Fb", "Fast", "Tea", "Ada"])
def test_int8_weights_are_cached(name):
    """Quantised layers have no parameters at all."""
    model = make_tiny_flux()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert model_fingerprint(model) != model_fingerprint(make_tiny_flux())
    sampler = FluxSampler(model)
    options = {"target_compute": 0.5} if name == "Auto" else {"rel_l1_thresh": 0.5}
    enable_cache(model, name, scheduler=sampler.scheduler, **options)
    assert sampler.run(8, finish=False).isfinite().all()
    assert cache_summary(model).num_steps == 8


def test_a_budget_needs_no_plan_of_the_model(caplog):
    """The small FLUX pipeline has a plan beside it: of its own weights alone."""
    pipe = FluxPipeline.from_pretrained(PIPELINES / "flux")
    pipe.set_progress_bar_config(disable=True)
    tuned(pipe.transformer)
    with caplog.at_level(logging.WARNING):
        enable_cache(pipe, Auto(target_compute=0.5))
    told = [r.message for r in caplog.records if "Auto decides by its own rule" in r.message]
    assert len(told) == 1 and "was fitted on another transformer" in told[0]
    pipe(
        "a red circle",
        num_inference_steps=8,
        height=32,
        width=32,
        max_sequence_length=8,
        output_type="latent",
    )
    summary = cache_summary(pipe)
    assert (summary.computed_steps, summary.plan) == (4, None)
