"""Picture quality against the formulas and the libraries that define it."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmark.errors import BenchmarkError
from benchmark.score import pictures as metrics
from benchmark.score.perceptual import Lpips, load_lpips


def pictures(number=3, size=16, seed=0):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_the_formula_for_each_picture():
    a, b = pictures(seed=1), pictures(seed=2)
    for index, found in enumerate(metrics.psnr_db(a, b)):
        pairs = zip(a[index].flatten().tolist(), b[index].flatten().tolist(), strict=True)
        squares = [(x - y) ** 2 for x, y in pairs]
        assert found == pytest.approx(10 * math.log10(len(squares) / sum(squares)), abs=1e-9)


def test_psnr_does_not_wrap_around_where_integers_would():
    dark, light = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 250 / 255)
    (found,) = metrics.psnr_db(light, dark)
    assert found == pytest.approx(-20 * math.log10(250 / 255), abs=1e-5)
    wrapped = (dark * 255).byte() - (light * 255).byte()
    assert wrapped.float().square().mean() < 50  # what a difference of uint8 would have made of it


@pytest.mark.parametrize("noise", [0.5, 0.03, 1e-4])
def test_psnr_is_scikit_image_s(noise):
    reference = pictures(seed=1)
    made = (reference + noise * torch.randn(reference.shape)).clamp(0, 1)
    for index, found in enumerate(metrics.psnr_db(made, reference)):
        pair = (x[index].double().numpy() for x in (reference, made))
        expected = peak_signal_noise_ratio(*pair, data_range=1.0)
        assert found == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("true_db", [30.0, 22.0, 14.0])
def test_differences_of_bytes_read_as_28_to_33_db_whatever_the_error(true_db):
    """What `docs/notes/psnr.md` says of tables whose tools subtract uint8 arrays."""
    generator = np.random.default_rng(0)
    reference = generator.integers(64, 192, size=(256, 256, 3)).astype(np.float64)
    made = reference + 255 * 10 ** (-true_db / 20) * generator.normal(size=reference.shape)
    made, reference = (np.clip(np.round(x), 0, 255).astype(np.uint8) for x in (made, reference))
    (found,) = metrics.psnr_db(*(torch.from_numpy(x / 255.0)[None] for x in (made, reference)))
    assert found == pytest.approx(true_db, abs=0.8)
    wrapped = np.mean((made - reference) ** 2)  # both operations wrap
    assert 27.5 < 10 * math.log10(255**2 / wrapped) < 33.0


def test_psnr_refuses_integer_pictures():
    whole = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="floating point"):
        metrics.psnr_db(whole, whole)


def test_identical_pictures_count_as_100_db_and_are_counted():
    a = pictures()
    b = a.clone()
    b[0, 0, 0, 0] += 1e-7
    compared = metrics.compare(b, a)
    assert compared["identical"] == 2
    assert compared["psnr_per_picture"] == [100.0, 100.0, 100.0]
    assert compared["psnr_db"] == {"mean": 100.0, "std": 0.0, "min": 100.0}


def test_spread_of_a_single_value_has_no_deviation():
    assert metrics.spread([2.0]) == {"mean": 2.0, "std": 0.0, "min": 2.0}
    assert metrics.spread([1.0, 3.0])["std"] == pytest.approx(math.sqrt(2), abs=1e-4)


class Pooled(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_frechet_distance_is_that_of_torchmetrics():
    network, real, made = Pooled(), pictures(64, seed=3), 0.8 * pictures(48, seed=4)
    reference = FrechetInceptionDistance(feature=network, normalize=True)
    reference.update(real, real=True)
    reference.update(made, real=False)
    found = metrics.frechet_distance(network(made), network(real))
    assert found == pytest.approx(float(reference.compute()), rel=1e-4)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_few_pictures():
    features = pictures(5).flatten(1)[:, :20]
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-4)


def test_the_standard_error_of_a_proportion():
    assert metrics.proportion_error(0.9, 64) == pytest.approx(math.sqrt(0.09 / 64))


def alexnet_features(net, pretrained=False):
    """torchvision's AlexNet layers, by their published sizes."""
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, lambda: torch.nn.MaxPool2d(3, 2)
    layers = [conv(3, 64, 11, 4, 2), relu(), pool(), conv(64, 192, 5, padding=2), relu(), pool()]
    layers += [conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()]
    return torch.nn.Sequential(*layers, conv(256, 256, 3, padding=1), relu(), pool())


def test_lpips_from_a_file_is_that_of_torchmetrics(tmp_path, monkeypatch):
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", alexnet_features)
    torch.manual_seed(0)
    reference = torchmetrics_lpips._LPIPS(pretrained=False, net="alex", pnet_rand=True)
    torch.save(reference.state_dict(), tmp_path / "alex.pth")
    a, b = pictures(size=64, seed=5), pictures(size=64, seed=6)
    expected = reference(a, b, normalize=True).flatten()
    torch.testing.assert_close(load_lpips(str(tmp_path / "alex.pth"))(a, b), expected)


def test_lpips_names_the_file_that_it_cannot_use(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(BenchmarkError, match="other.pth cannot be used: no state dict of LPIPS"):
        load_lpips(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="LPIPS with AlexNet"):
        Lpips({})
