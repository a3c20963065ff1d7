"""A small classifier of clips: judge of prompts, and feature network for Fréchet distances."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmark.small.clips import FRAMES
from benchmark.small.judge import Judge, convolutions, label_accuracy
from benchmark.small.motion import CHOICES, moving_labels, parse_prompt


class ClipJudge(nn.Module):
    """The picture judge's convolutions on every second frame, and a layer that sees them all.

    The module itself maps clips to features. A linear head for each column of a label row reads
    shape and colours as well as direction and speed from them.
    """

    def __init__(self, width: int = 24, num_features: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "num_features": num_features}
        self.num_features = num_features
        self.frames = convolutions(width, num_features)
        self.body = nn.Linear(FRAMES // 2 * num_features, num_features)
        self.heads = nn.Linear(num_features, sum(CHOICES))

    def start_from(self, judge: Judge) -> None:
        """Takes the convolutions of a picture judge of the same widths."""
        self.frames.load_state_dict(judge.body.state_dict())

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Features [N, 64] of clips [N, 16, 3, 64, 64]: uint8 in 0..255, or float in [0, 1]."""
        if clips.ndim != 5 or tuple(clips.shape[1:]) != (FRAMES, 3, 64, 64):
            raise ValueError(f"clips must be [N, {FRAMES}, 3, 64, 64], got {list(clips.shape)}")
        frames = clips[:, ::2].flatten(0, 1)
        if frames.dtype == torch.uint8:
            frames = frames / 255
        features = self.frames(2 * frames.to(self.heads.weight.dtype) - 1)
        return self.body(F.gelu(features).unflatten(0, (len(clips), -1)).flatten(1))

    @torch.no_grad()
    def features(self, clips: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
        """Features float32 [N, 64] of float clips in [0, 1], computed in batches."""
        return torch.cat([self(part).float() for part in clips.split(batch_size)])

    def logits(self, clips: torch.Tensor) -> torch.Tensor:
        """All heads' logits [N, sum(CHOICES)], side by side in the order of `motion.LABELS`."""
        return self.heads(F.gelu(self(clips)))

    @torch.no_grad()
    def predict(self, clips: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
        """Label rows, int64 [N, 6], in the order of `motion.LABELS`."""
        heads = torch.cat([self.logits(part) for part in clips.split(batch_size)])
        return torch.stack([head.argmax(dim=1) for head in heads.split(CHOICES, dim=1)], dim=1)

    def prompt_accuracy(self, clips: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """How much of their prompts the clips show.

        Args:
            clips: [N, 16, 3, 64, 64], float in [0, 1] or uint8.
            prompts: N prompts that `motion.parse_prompt` understands.

        Returns:
            `attributes`: the mean share of a prompt's attributes (shape, colour, direction, speed,
            the background's colour and pattern) that are right; `whole`: the share of clips with
            all of them right.
        """
        if len(clips) != len(prompts):
            raise ValueError(f"{len(clips)} clips do not match {len(prompts)} prompts")
        if not prompts:
            raise ValueError("prompts must not be empty")
        wanted = moving_labels(parse_prompt(prompt) for prompt in prompts)
        return label_accuracy(self.predict(clips).cpu(), wanted)
