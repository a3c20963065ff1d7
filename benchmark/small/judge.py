"""A small classifier of scenes: judge of prompts, and feature network for Fréchet distances."""

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmark.small.scenes import CHOICES, LABELS, parse_prompt, scene_labels

logger = logging.getLogger(__name__)

JudgeLike = TypeVar("JudgeLike", bound=nn.Module)


def convolutions(width: int, num_features: int) -> nn.Sequential:
    """Four convolutions of stride 2 and a linear layer: [N, 3, 64, 64] to [N, num_features]."""
    widths = [3, width, 2 * width, 3 * width, 3 * width]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.GELU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, num_features))


class Judge(nn.Module):
    """A convolutional classifier with one head for each column of a label row.

    The module itself maps pictures to features, so that
    `torchmetrics.image.fid.FrechetInceptionDistance(feature=judge)` accepts it.
    """

    def __init__(self, width: int = 24, num_features: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "num_features": num_features}
        self.num_features = num_features
        self.body = convolutions(width, num_features)
        self.heads = nn.Linear(num_features, sum(CHOICES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, 64] of pictures [N, 3, 64, 64]: uint8 in 0..255, or float in [0, 1]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 64, 64):
            raise ValueError(f"images must be [N, 3, 64, 64], got {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images / 255
        return self.body(2 * images.to(self.heads.weight.dtype) - 1)

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Features float32 [N, 64] of float pictures in [0, 1], computed in batches."""
        return torch.cat([self(part).float() for part in images.split(batch_size)])

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """All heads' logits [N, sum(CHOICES)], side by side in the order of `LABELS`."""
        return self.heads(F.gelu(self(images)))

    @torch.no_grad()
    def predict(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Label rows, int64 [N, 7]; the second object's are -1 where one object is seen."""
        parts = [self.logits(part) for part in images.split(batch_size)]
        heads = torch.cat(parts).split(CHOICES, dim=1)
        labels = torch.stack([head.argmax(dim=1) for head in heads], dim=1)
        second = [LABELS.index("shape_2"), LABELS.index("colour_2")]
        alone = labels[:, 0] == 0
        labels[:, second] = labels[:, second].masked_fill(alone.unsqueeze(1), -1)
        return labels

    def prompt_accuracy(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """How much of their prompts the pictures show.

        Args:
            images: [N, 3, 64, 64], float in [0, 1] or uint8.
            prompts: N prompts that `scenes.parse_prompt` understands.

        Returns:
            `attributes`: the mean share of a prompt's attributes (number of objects, their
            shapes and colours, the background's colour and pattern) that are right;
            `whole`: the share of pictures with all of them right.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts")
        if not prompts:
            raise ValueError("prompts must not be empty")
        wanted = scene_labels(parse_prompt(prompt) for prompt in prompts)
        return label_accuracy(self.predict(images).cpu(), wanted)


def label_accuracy(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """`Judge.prompt_accuracy` of label rows [N, 7] found in pictures against those wanted."""
    asked = wanted >= 0
    right = (found == wanted) & asked
    share = right.sum(dim=1) / asked.sum(dim=1)
    return {"attributes": share.mean().item(), "whole": (share == 1).float().mean().item()}


def save_judge(judge: nn.Module, path: Path) -> None:
    """Writes `config.json` and `judge.safetensors` into the directory `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(judge.config, indent=1) + "\n")
    weights = {name: tensor.contiguous().cpu() for name, tensor in judge.state_dict().items()}
    save_file(weights, path / "judge.safetensors")


def load_judge(path: str | Path, judge_class: Callable[..., JudgeLike] = Judge) -> JudgeLike:
    """The judge that `save_judge` wrote, in evaluation mode and without gradients.

    Args:
        path: the directory.
        judge_class: `Judge`, or `clip_judge.ClipJudge` for one of clips.

    Raises:
        FileNotFoundError: the directory holds no judge.
    """
    path = Path(path)
    for name in ("config.json", "judge.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(f"no judge in {path}: {name} is missing")
    judge = judge_class(**json.loads((path / "config.json").read_text()))
    judge.load_state_dict(load_file(path / "judge.safetensors"))
    return judge.eval().requires_grad_(False)
