"""Scenes of one moving shape, and the prompts that describe them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmark.small.scenes import COLOURS, PATTERNS, SHAPES, check_word, sample_outside

DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
WORDS = ("moves", *DIRECTIONS, *SPEEDS)

# The columns of a label row.
LABELS = ("shape", "colour", "direction", "speed", "background", "pattern")
CHOICES = (len(SHAPES), len(COLOURS), len(DIRECTIONS), len(SPEEDS), len(COLOURS), len(PATTERNS))

_PROMPT = re.compile(
    r"an? (\w+) (\w+) moves (\w+) (\w+) on an? (\w+) (\w+) background", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingScene:
    """One clip's content: what its prompt says, without positions and sizes."""

    shape: str
    colour: str
    direction: str
    """`left`, `right`, `up` or `down`."""

    speed: str
    """`slowly` or `quickly`."""

    background: str
    """The background's colour, which the object does not have."""

    pattern: str
    """`plain`, `striped` or `checkered`."""

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("colour", self.colour, COLOURS)
        check_word("direction", self.direction, DIRECTIONS)
        check_word("speed", self.speed, SPEEDS)
        check_word("background", self.background, COLOURS)
        check_word("pattern", self.pattern, PATTERNS)
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
    colour, shape, direction, speed, background, pattern = (w.lower() for w in match.groups())
    return MovingScene(
        shape=shape,
        colour=colour,
        direction=direction,
        speed=speed,
        background=background,
        pattern=pattern,
    )


def moving_labels(scenes: Iterable[MovingScene]) -> torch.Tensor:
    """Label rows, int64 [N, 6], in the order of `LABELS`."""
    rows = [
        [
            SHAPES.index(scene.shape),
            COLOURS.index(scene.colour),
            DIRECTIONS.index(scene.direction),
            SPEEDS.index(scene.speed),
            COLOURS.index(scene.background),
            PATTERNS.index(scene.pattern),
        ]
        for scene in scenes
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(LABELS))


def labels_moving(row: Sequence[int]) -> MovingScene:
    """The scene of one label row."""
    shape, colour, direction, speed, background, pattern = (int(x) for x in row)
    return MovingScene(
        shape=SHAPES[shape],
        colour=COLOURS[colour],
        direction=DIRECTIONS[direction],
        speed=SPEEDS[speed],
        background=COLOURS[background],
        pattern=PATTERNS[pattern],
    )


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
