"""A small classifier of scenes: judge of prompts, and feature network for Fréchet distances."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmark.small.scenes import CHOICES, LABELS, parse_prompt, scene_labels

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


class Classifier(nn.Module):
    """Maps pictures or clips to features, from which a linear head reads each label.

    `torchmetrics.image.fid.FrechetInceptionDistance(feature=judge)` accepts it.
    """

    what: str
    """What it takes, for messages."""
    shape: tuple[int, ...]
    """Of one of those."""
    choices: tuple[int, ...]
    """How many values each column of a label row has."""
    batch_size: int

    def __init__(self, width: int = 24, num_features: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "num_features": num_features}
        self.num_features = num_features
        self.make_layers(width, num_features)
        self.heads = nn.Linear(num_features, sum(self.choices))

    def make_layers(self, width: int, num_features: int) -> None:
        """Makes what `forward` needs."""
        raise NotImplementedError

    def wanted(self, prompts: Sequence[str]) -> torch.Tensor:
        """Label rows of prompts; ValueError for one that is not understood."""
        raise NotImplementedError

    def pixels(self, given: torch.Tensor) -> torch.Tensor:
        """In [-1, 1] what is given as uint8 in 0..255, or as float in [0, 1]."""
        if tuple(given.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"{self.what} must be [N, {expected}], got {list(given.shape)}")
        if given.dtype == torch.uint8:
            given = given / 255
        return 2 * given.to(self.heads.weight.dtype) - 1

    @torch.no_grad()
    def features(self, given: torch.Tensor) -> torch.Tensor:
        """Features float32 [N, 64], computed in batches."""
        return torch.cat([self(part).float() for part in given.split(self.batch_size)])

    def logits(self, given: torch.Tensor) -> torch.Tensor:
        """All heads' logits [N, sum(choices)], side by side in the order of the labels."""
        return self.heads(F.gelu(self(given)))

    @torch.no_grad()
    def predict(self, given: torch.Tensor) -> torch.Tensor:
        """Label rows, int64 [N, columns]."""
        parts = [self.logits(part) for part in given.split(self.batch_size)]
        heads = torch.cat(parts).split(self.choices, dim=1)
        return torch.stack([head.argmax(dim=1) for head in heads], dim=1)

    def prompt_accuracy(self, given: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """How much of their prompts pictures or clips show.

        Args:
            given: [N, *shape], float in [0, 1] or uint8.
            prompts: N prompts of the form that the classifier understands.

        Returns:
            `attributes`: the mean share of a prompt's attributes that are right; `whole`: the share
            of pictures or clips with all of them right.
        """
        if len(given) != len(prompts):
            raise ValueError(f"{len(given)} {self.what} do not match {len(prompts)} prompts")
        if not prompts:
            raise ValueError("prompts must not be empty")
        return label_accuracy(self.predict(given).cpu(), self.wanted(prompts))


class Judge(Classifier):
    """Of pictures [N, 3, 64, 64]: number of objects, their shapes and colours, the background."""

    what, shape, choices, batch_size = "images", (3, 64, 64), CHOICES, 256

    def make_layers(self, width: int, num_features: int) -> None:
        self.body = convolutions(width, num_features)

    def wanted(self, prompts: Sequence[str]) -> torch.Tensor:
        return scene_labels(parse_prompt(prompt) for prompt in prompts)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, 64]."""
        return self.body(self.pixels(images))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """The second object's labels are -1 where one object is seen."""
        labels = super().predict(images)
        second = [LABELS.index("shape_2"), LABELS.index("colour_2")]
        labels[:, second] = labels[:, second].masked_fill(labels[:, :1] == 0, -1)
        return labels


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
