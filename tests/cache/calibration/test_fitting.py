"""Calibration: the fits recover what they should, on real transformer calls."""

import numpy as np
import pytest
import torch

from tests.tiny import all_blocks
from xfuser_adacorr.model_executor.cache.calibration.fitting import (
    FastRecorder,
    LinearMapFit,
    TeaRecorder,
)
from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX


def test_tea_fit_recovers_a_polynomial():
    truth = np.polynomial.Polynomial([0.01, 0.5, -0.3, 2.0, 1.0])
    recorder = TeaRecorder(changes=[(x, float(truth(x))) for x in np.linspace(0.02, 0.6, 40)])
    polynomial = recorder.fit()
    assert polynomial.domain == pytest.approx((0.02, 0.6))
    for x in (0.05, 0.2, 0.5):
        assert polynomial(x) == pytest.approx(float(truth(x)), rel=1e-6)


def test_tea_fit_needs_enough_changes():
    with pytest.raises(ValueError, match="more than 4 changes"):
        TeaRecorder(changes=[(0.1, 0.2)]).fit()


def test_tea_recorder_measures_changes_within_a_run(sampler):
    recorder = TeaRecorder()
    with recorder.attached(sampler.transformer, FLUX):
        for _ in range(2):
            recorder.begin()
            sampler.run(6)
    assert len(recorder.changes) == 2 * 5
    assert all(x > 0 and y > 0 for x, y in recorder.changes)
    assert not all_blocks(sampler.transformer)[0]._forward_pre_hooks


def test_linear_map_is_recovered():
    generator = torch.Generator().manual_seed(0)
    weight, bias = 0.1 * torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)
    fit = LinearMapFit(6)
    x = torch.randn(4, 50, 6, generator=generator)
    fit.add(x, x + x @ weight.T + bias)
    found_weight, found_bias = fit.solve()
    torch.testing.assert_close(found_weight, weight, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(found_bias, bias, rtol=0.02, atol=2e-3)


def test_fast_recorder_fits_every_block_stream_and_the_stack(sampler):
    recorder = FastRecorder()
    with recorder.attached(sampler.transformer, FLUX):
        sampler.run(6)
    maps = recorder.maps()
    assert len(maps) == 2 * (2 * len(all_blocks(sampler.transformer)) + 1)
    assert maps["stack.hidden_states.weight"].shape == (32, 32)
