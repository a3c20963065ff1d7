"""LPIPS with AlexNet (Zhang et al. 2018) and Inception features, with weights from files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmark.errors import BenchmarkError

_SLICES = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
_CHANNELS = (64, 192, 384, 256, 256)


class Lpips(nn.Module):
    """Distance of unit-normalised AlexNet activations after five layers, weighted by channel.

    Args:
        state: a state dict of the ``lpips`` package's or torchmetrics' LPIPS with AlexNet, with the
            keys ``net.slice1.0.weight`` ... ``net.slice5.10.bias`` and ``lin0.model.1.weight`` ...

    Raises:
        ValueError: a key is missing or has another shape.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        weights = []
        try:
            for index, name in enumerate(_SLICES):
                convolution = {k: state[f"net.{name}.{k}"] for k in ("weight", "bias")}
                self.convolutions[index].load_state_dict(convolution)
                weights.append(state[f"lin{index}.model.1.weight"].view(1, _CHANNELS[index], 1, 1))
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"no state dict of LPIPS with AlexNet: {error}") from error
        self.weights = nn.ParameterList(weights)
        self.eval().requires_grad_(False)

    def _activations(self, pictures: Tensor) -> list[Tensor]:
        hidden = (2 * pictures - 1 - self.shift) / self.scale
        activations = []
        for index, convolution in enumerate(self.convolutions):
            if index in (1, 2):
                hidden = nn.functional.max_pool2d(hidden, 3, stride=2)
            hidden = convolution(hidden).relu()
            norm = hidden.square().sum(dim=1, keepdim=True).sqrt()
            activations.append(hidden / (norm + 1e-8))
        return activations

    @torch.no_grad()
    def forward(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """Distances [N] of pictures [N, 3, H, W] in [0, 1]."""
        pairs = zip(
            self.weights, self._activations(pictures), self._activations(reference), strict=True
        )
        return sum(
            (weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2)) for weight, a, b in pairs
        )


def load_lpips(path: str) -> Lpips:
    """LPIPS from a state-dict file; `BenchmarkError` if it cannot be read."""
    try:
        return Lpips(torch.load(_existing(path, "--lpips_weights"), weights_only=True))
    except BenchmarkError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise BenchmarkError(f"--lpips_weights: {path} cannot be used: {reason}") from error


def load_inception(path: str) -> Callable[[Tensor], Tensor]:
    """Pictures -> the 2048 Inception features of the published FID, with weights from a file."""
    _existing(path, "--inception_weights")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).eval()
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"--inception_weights needs the package torch-fidelity ({error}): "
            "install the extra with pip install -e '.[inception]'"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise BenchmarkError(f"--inception_weights: {path} cannot be used: {reason}") from error
    return lambda pictures: network((pictures * 255).round().to(torch.uint8))[0]


def _existing(path: str, option: str) -> Path:
    if not Path(path).is_file():
        raise BenchmarkError(f"{option}: no file {path}")
    return Path(path)
