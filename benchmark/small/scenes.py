"""Scenes of one or two coloured shapes, and the prompts that describe them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "cross")
PATTERNS = ("plain", "striped", "checkered")

# The columns of a label row. The second object's columns are -1 where there is none.
LABELS = ("count", "shape_1", "colour_1", "shape_2", "colour_2", "background", "pattern")
CHOICES = (2, len(SHAPES), len(COLOURS), len(SHAPES), len(COLOURS), len(COLOURS), len(PATTERNS))

_PROMPT = re.compile(
    r"an? (\w+) (\w+)(?: and an? (\w+) (\w+))? on an? (\w+) (\w+) background", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One picture's content: what its prompt says, without positions and sizes."""

    objects: tuple[tuple[str, str], ...]
    """One or two (colour, shape) pairs; of two, the first is on the left."""

    background: str
    """The background's colour, which no object has."""

    pattern: str
    """`plain`, `striped` or `checkered`."""

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"objects must be one or two, got {len(self.objects)}")
        for colour, shape in self.objects:
            check_word("an object's colour", colour, COLOURS)
            check_word("an object's shape", shape, SHAPES)
            if colour == self.background:
                raise ValueError(f"an object has the background's colour, {colour!r}")
        check_word("background", self.background, COLOURS)
        check_word("pattern", self.pattern, PATTERNS)

    @property
    def prompt(self) -> str:
        """The prompt in the one form that the pictures' captions have."""
        objects = " and ".join(f"a {colour} {shape}" for colour, shape in self.objects)
        return f"{objects} on a {self.background} {self.pattern} background"


def parse_prompt(prompt: str) -> Scene:
    """The scene of a prompt such as `a red circle on a white striped background`.

    Raises:
        ValueError: the prompt has another form, an unknown word, or an impossible colour.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not of the form 'a COLOUR SHAPE [and a COLOUR SHAPE] "
            "on a COLOUR PATTERN background'"
        )
    words = [word.lower() if word else None for word in match.groups()]
    objects = [(words[0], words[1])]
    if words[2] is not None:
        objects.append((words[2], words[3]))
    return Scene(objects=tuple(objects), background=words[4], pattern=words[5])


def scene_labels(scenes: Iterable[Scene]) -> torch.Tensor:
    """Label rows, int64 [N, 7], in the order of `LABELS`."""
    rows = []
    for scene in scenes:
        row = [len(scene.objects) - 1]
        for colour, shape in scene.objects:
            row += [SHAPES.index(shape), COLOURS.index(colour)]
        row += [-1, -1] * (2 - len(scene.objects))
        row += [COLOURS.index(scene.background), PATTERNS.index(scene.pattern)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(LABELS))


def labels_scene(row: Sequence[int]) -> Scene:
    """The scene of one label row."""
    count, shape_1, colour_1, shape_2, colour_2, background, pattern = (int(x) for x in row)
    objects = [(COLOURS[colour_1], SHAPES[shape_1])]
    if count == 1:
        objects.append((COLOURS[colour_2], SHAPES[shape_2]))
    return Scene(objects=tuple(objects), background=COLOURS[background], pattern=PATTERNS[pattern])


def sample_labels(
    number: int,
    generator: torch.Generator,
    exclude: torch.Tensor | None = None,
    single_share: float = 0.25,
) -> torch.Tensor:
    """Draws label rows, int64 [number, 7].

    Args:
        number: how many rows.
        generator: the seeded source of all randomness.
        exclude: label rows [M, 7] that must not be drawn (a held-back split).
        single_share: the share of scenes with one object.
    """
    return sample_outside(lambda: _draw(number, generator, single_share), number, exclude)


def sample_outside(
    draw: Callable[[], torch.Tensor], number: int, exclude: torch.Tensor | None
) -> torch.Tensor:
    """Draws label rows [.., columns] until `number` of them are none of the rows `exclude`."""
    kept: list[torch.Tensor] = []
    found = 0
    while found < number:
        labels = draw()
        if exclude is not None:
            labels = labels[~torch.isin(_codes(labels), _codes(exclude))]
        kept.append(labels)
        found += len(labels)
    return torch.cat(kept)[:number] if kept else draw()[:0]


def sample_scene(generator: torch.Generator) -> Scene:
    """Draws one scene."""
    return labels_scene(sample_labels(1, generator)[0])


def _draw(number: int, generator: torch.Generator, single_share: float) -> torch.Tensor:
    def choice(size: int) -> torch.Tensor:
        return torch.randint(size, (number,), generator=generator)

    colours = len(COLOURS)
    two = torch.rand(number, generator=generator) >= single_share
    background = choice(colours)
    columns = [
        two.long(),
        choice(len(SHAPES)),
        (background + 1 + choice(colours - 1)) % colours,
        choice(len(SHAPES)).where(two, torch.tensor(-1)),
        ((background + 1 + choice(colours - 1)) % colours).where(two, torch.tensor(-1)),
        background,
        choice(len(PATTERNS)),
    ]
    return torch.stack(columns, dim=1)


def _codes(labels: torch.Tensor) -> torch.Tensor:
    return ((labels + 1) * 10 ** torch.arange(labels.shape[1])).sum(dim=1)


def check_word(name: str, given: str, accepted: Sequence[str]) -> None:
    """Raises ValueError where the word `given` for `name` is not one of `accepted`."""
    if given not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {given!r}")
