"""Scenes of one moving shape, and the prompts that describe them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmark.small.scenes import COLOURS, PATTERNS, SHAPES, check_word, sample_outside

DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
WORDS = ("moves", *DIRECTIONS, *SPEEDS)

VALUES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "background": COLOURS,
    "pattern": PATTERNS,
}
"""The columns of a label row, and the words that they stand for."""
LABELS = tuple(VALUES)
CHOICES = tuple(map(len, VALUES.values()))

_PROMPT = re.compile(
    r"an? (?P<colour>\w+) (?P<shape>\w+) moves (?P<direction>\w+) (?P<speed>\w+) "
    r"on an? (?P<background>\w+) (?P<pattern>\w+) background",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingScene:
    """One clip's content: what its prompt says, without positions and sizes."""

    shape: str
    colour: str
    direction: str
    speed: str
    background: str
    """The background's colour, which the object does not have."""
    pattern: str

    def __post_init__(self) -> None:
        for name, accepted in VALUES.items():
            check_word(name, getattr(self, name), accepted)
        if self.colour == self.background:
            raise ValueError(f"the object has the background's colour, {self.colour!r}")

    @property
    def prompt(self) -> str:
        """The prompt in the one form that the clips' captions have."""
        return (
            f"a {self.colour} {self.shape} moves {self.direction} {self.speed} "
            f"on a {self.background} {self.pattern} background"
        )


def parse_prompt(prompt: str) -> MovingScene:
    """The scene of a prompt such as `a red circle moves left quickly on a white plain background`.

    Raises:
        ValueError: the prompt has another form, an unknown word, or an impossible colour.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not of the form 'a COLOUR SHAPE moves DIRECTION SPEED "
            "on a COLOUR PATTERN background'"
        )
    return MovingScene(**{name: word.lower() for name, word in match.groupdict().items()})


def moving_labels(scenes: Iterable[MovingScene]) -> torch.Tensor:
    """Label rows, int64 [N, 6], in the order of `LABELS`."""
    rows = [
        [words.index(getattr(scene, name)) for name, words in VALUES.items()] for scene in scenes
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(LABELS))


def labels_moving(row: Sequence[int]) -> MovingScene:
    """The scene of one label row."""
    columns = zip(VALUES.items(), row, strict=True)
    return MovingScene(**{name: words[int(index)] for (name, words), index in columns})


def reversed_motion(labels: torch.Tensor) -> torch.Tensor:
    """Label rows [N, 6] of the same clips played backwards."""
    labels = labels.clone()
    # left and right, up and down are neighbours
    labels[:, LABELS.index("direction")] ^= 1
    return labels


def sample_labels(
    number: int, generator: torch.Generator, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """Draws label rows, int64 [number, 6], none of which is a row of `exclude` [M, 6]."""

    def choice(size: int) -> torch.Tensor:
        return torch.randint(size, (number,), generator=generator)

    def draw() -> torch.Tensor:
        background = choice(len(COLOURS))
        columns = [
            choice(len(SHAPES)),
            (background + 1 + choice(len(COLOURS) - 1)) % len(COLOURS),
            choice(len(DIRECTIONS)),
            choice(len(SPEEDS)),
            background,
            choice(len(PATTERNS)),
        ]
        return torch.stack(columns, dim=1)

    return sample_outside(draw, number, exclude)
