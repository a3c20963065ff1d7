"""Clip quality against the formulas written out."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from benchmark.score import clips as video_metrics


def clips(seed, number=2, frames=4, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, frames, 3, size, size, generator=generator)


def psnr(a, b, data_range=1.0):
    return 10 * math.log10(data_range**2 / (a.double() - b.double()).square().mean().item())


def test_psnr_is_the_mean_over_the_frames_and_the_worst_frame():
    a, b = clips(1), clips(2)
    b[:, 2] = 0.9 * a[:, 2] + 0.1 * b[:, 2]
    frames = [[psnr(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]
    found = video_metrics.compare_clips(b, a)
    means = [sum(values) / len(values) for values in frames]
    assert found["psnr_per_picture"] == pytest.approx(means, abs=1e-3)
    assert found["psnr_db"]["mean"] == pytest.approx(sum(means) / 2, abs=1e-3)
    worst = [min(values) for values in frames]
    assert found["worst_frame_psnr_db"]["mean"] == pytest.approx(sum(worst) / 2, abs=1e-3)
    assert found["worst_frame_psnr_db"]["min"] == pytest.approx(min(worst), abs=1e-3)


def test_ssim_is_the_mean_over_the_frames_and_of_the_worst_frames():
    a = clips(1)
    b = (a + 0.1 * torch.arange(1, 5).view(1, 4, 1, 1, 1) * clips(2)).clamp(0, 1)
    frames = [
        [ssim(b[n, f, None], a[n, f, None], data_range=1.0) for f in range(4)] for n in (0, 1)
    ]
    found = video_metrics.compare_clips(b, a)
    assert found["ssim"] == pytest.approx(float(sum(map(sum, frames)) / 8), abs=1e-5)
    assert found["worst_frame_ssim"] == pytest.approx(float(sum(map(min, frames)) / 2), abs=1e-5)


def test_temporal_psnr_compares_frame_differences_for_a_range_of_2():
    a, b = clips(1), clips(2)
    found = video_metrics.temporal_psnr_db(b, a)
    for index, value in enumerate(found):
        differences = [clip[index, 1:] - clip[index, :-1] for clip in (b, a)]
        assert value == pytest.approx(psnr(*differences, data_range=2.0), abs=1e-4)


def test_a_constant_error_costs_no_temporal_consistency_and_flicker_does():
    reference = torch.full((1, 4, 3, 16, 16), 0.5)
    offset = torch.full((4,), 0.1)
    flicker = 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    constant, flickering = (
        video_metrics.compare_clips(reference + x.view(1, 4, 1, 1, 1), reference)
        for x in (offset, flicker)
    )
    assert constant["psnr_db"]["mean"] == pytest.approx(20, abs=1e-3)
    assert flickering["psnr_db"]["mean"] == pytest.approx(20, abs=1e-3)
    assert constant["temporal_psnr_db"]["mean"] == 100
    assert flickering["temporal_psnr_db"]["mean"] == pytest.approx(20, abs=1e-3)


def test_identical_clips_are_counted():
    a = clips(1)
    found = video_metrics.compare_clips(torch.cat([a[:1], clips(2)[:1]]), a)
    assert found["identical"] == 1
    assert found["psnr_per_picture"][0] == 100


def test_one_frame_has_no_differences():
    with pytest.raises(ValueError, match="at least two frames"):
        video_metrics.temporal_psnr_db(clips(1, frames=1), clips(2, frames=1))
