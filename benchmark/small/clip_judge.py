"""A small classifier of clips: judge of prompts, and feature network for Fréchet distances."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmark.small.clips import FRAMES
from benchmark.small.judge import Classifier, Judge, convolutions
from benchmark.small.motion import CHOICES, moving_labels, parse_prompt


class ClipJudge(Classifier):
    """Of clips [N, 16, 3, 64, 64]: shape, colours, direction, speed and the background's pattern.

    The picture judge's convolutions on every second frame, and a layer that sees them all. Of
    longer clips it looks at the first 16 frames.
    """

    what, shape, choices, batch_size = "clips", (FRAMES, 3, 64, 64), CHOICES, 32

    def make_layers(self, width: int, num_features: int) -> None:
        self.frames = convolutions(width, num_features)
        self.body = nn.Linear(FRAMES // 2 * num_features, num_features)

    def wanted(self, prompts: Sequence[str]) -> torch.Tensor:
        return moving_labels(parse_prompt(prompt) for prompt in prompts)

    def start_from(self, judge: Judge) -> None:
        """Takes the convolutions of a picture judge of the same widths."""
        self.frames.load_state_dict(judge.body.state_dict())

    def pixels(self, clips: torch.Tensor) -> torch.Tensor:
        return super().pixels(clips[:, :FRAMES])

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Features [N, 64]."""
        features = self.frames(self.pixels(clips)[:, ::2].flatten(0, 1))
        return self.body(F.gelu(features).unflatten(0, (len(clips), -1)).flatten(1))
