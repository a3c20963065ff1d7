"""Draws scenes as anti-aliased 64x64 pictures from signed distances, a batch at a time."""

import torch

from benchmark.small.scenes import PATTERNS, SHAPES

SIZE = 64

# One row for each colour of `scenes.COLOURS`, RGB in [0, 1].
PALETTE = torch.tensor(
    [
        [0.88, 0.12, 0.14],
        [0.14, 0.68, 0.22],
        [0.13, 0.27, 0.90],
        [0.98, 0.85, 0.10],
        [0.60, 0.20, 0.76],
        [0.20, 0.83, 0.90],
        [0.97, 0.97, 0.97],
    ]
)
SHADE = 0.62


def render(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws label rows with random positions, sizes and pattern phases.

    Args:
        labels: int64 [N, 7], as `scenes.scene_labels` gives them.
        generator: the seeded source of positions, sizes and phases.

    Returns:
        float32 [N, 3, 64, 64] in [0, 1].
    """
    number = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(number, 1, 1, generator=generator)

    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    y, x = axis.view(1, SIZE, 1), axis.view(1, 1, SIZE)

    shade = pattern_shade(labels[:, 6], x, y, uniform(6.0, 9.0), uniform(0, 40), uniform(0, 40))
    image = PALETTE[labels[:, 5]].view(number, 3, 1, 1)
    image = image * (1 - (1 - SHADE) * shade.unsqueeze(1))

    two = (labels[:, 0] == 1).view(number, 1, 1)
    middle_x, middle_y, big = uniform(30, 34), uniform(30, 34), uniform(15, 17)
    left_x, left_y, left_size = uniform(15.5, 17.5), uniform(29, 35), uniform(11, 12.5)
    right_x, right_y, right_size = uniform(46.5, 48.5), uniform(29, 35), uniform(11, 12.5)

    first = shape_distance(
        labels[:, 1],
        x - torch.where(two, left_x, middle_x),
        y - torch.where(two, left_y, middle_y),
        torch.where(two, left_size, big),
    )
    image = paint(image, first, labels[:, 2])
    second = shape_distance(labels[:, 3], x - right_x, y - right_y, right_size)
    second = torch.where(two, second, torch.inf)
    return paint(image, second, labels[:, 4])


def pattern_shade(
    kind: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    width: torch.Tensor,
    phase_x: torch.Tensor,
    phase_y: torch.Tensor,
) -> torch.Tensor:
    """The share of shade in each pixel, [N, H, W]."""
    kind = kind.view(-1, 1, 1)
    rows = _wave(y + phase_y, width)
    columns = _wave(x + phase_x, width)
    checkered = rows * columns + (1 - rows) * (1 - columns)
    shade = torch.where(kind == PATTERNS.index("striped"), rows, checkered)
    return torch.where(kind == PATTERNS.index("plain"), 0.0, shade)


def _wave(position: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """A square wave of 0 and 1 with bands of `width` and edges one pixel wide."""
    inside = width / 2 - (position % (2 * width) - width).abs()
    return (inside + 0.5).clamp(0, 1)


def shape_distance(
    shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """Signed distance in pixels to each row's shape, negative inside, [N, H, W]."""

    def box(half_width: torch.Tensor, half_height: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    circle = (x.square() + y.square()).sqrt() - size
    square = box(0.88 * size, 0.88 * size)
    slope = 0.75**0.5 * x.abs() - 0.5 * y
    triangle = torch.maximum(y - 0.85 * size, slope - 0.55 * size)
    cross = torch.minimum(box(size, 0.36 * size), box(0.36 * size, size))
    by_name = {"circle": circle, "square": square, "triangle": triangle, "cross": cross}
    distance = circle
    for index, name in enumerate(SHAPES):
        distance = torch.where(shape.view(-1, 1, 1) == index, by_name[name], distance)
    return distance


def paint(image: torch.Tensor, distance: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, H, W] with the places inside a shape, [N, H, W], in each row's colour."""
    cover = (0.5 - distance).clamp(0, 1).unsqueeze(1)
    return torch.lerp(image, PALETTE[colour].view(-1, 3, 1, 1).expand_as(image), cover)
