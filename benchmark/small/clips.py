"""Draws clips of a shape that moves over a resting background, a batch at a time."""

import torch

from benchmark.small.motion import DIRECTIONS
from benchmark.small.pictures import PALETTE, SHADE, SIZE, paint, pattern_shade, shape_distance

FRAMES = 16
PIXELS_A_FRAME = (0.7, 1.9)
"""Velocities, in the order of `motion.SPEEDS`."""

# What the middle of the way may be off the picture's: along it slow and quick, and across it.
ROOM_ALONG, ROOM_ACROSS = (5.0, 2.0), 5.0


def render_clips(
    labels: torch.Tensor, generator: torch.Generator, frames: int = FRAMES
) -> torch.Tensor:
    """Draws label rows with random positions, sizes and pattern phases.

    The shape moves evenly along a straight line and never touches the border. Played backwards, a
    clip is as probable a clip of the opposite direction.

    Args:
        labels: int64 [N, 6], as `motion.moving_labels` gives them.
        generator: the seeded source of positions, sizes and phases.
        frames: how many, at most 17: the shape would leave longer clips.

    Returns:
        float32 [N, frames, 3, 64, 64] in [0, 1].

    Raises:
        ValueError: `frames` is out of range.
    """
    if not 1 <= frames <= FRAMES + 1:
        raise ValueError(f"frames must be in 1..{FRAMES + 1}, got {frames}")
    number = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(number, 1, 1, generator=generator)

    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    y, x = axis.view(1, SIZE, 1), axis.view(1, 1, SIZE)
    shape, colour, direction, speed, background, pattern = labels.unbind(dim=1)

    shade = pattern_shade(pattern, x, y, uniform(6.0, 9.0), uniform(0, 40), uniform(0, 40))
    image = PALETTE[background].view(number, 3, 1, 1)
    image = image * (1 - (1 - SHADE) * shade.unsqueeze(1))

    size = uniform(12.0, 13.0)
    along = torch.tensor(ROOM_ALONG)[speed].view(-1, 1, 1) * uniform(-1, 1)
    across = ROOM_ACROSS * uniform(-1, 1)
    time = torch.arange(frames) - (frames - 1) / 2
    way = torch.tensor(PIXELS_A_FRAME)[speed].view(-1, 1, 1) * time  # [N, 1, T]
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0])[direction].view(-1, 1, 1)
    along = SIZE / 2 + along + sign * way
    across = (SIZE / 2 + across).expand_as(along)
    sideways = (direction < DIRECTIONS.index("up")).view(-1, 1, 1)
    centre_x = torch.where(sideways, along, across).reshape(-1, 1, 1)
    centre_y = torch.where(sideways, across, along).reshape(-1, 1, 1)

    def every_frame(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(frames, dim=0)

    distance = shape_distance(every_frame(shape), x - centre_x, y - centre_y, every_frame(size))
    painted = paint(every_frame(image), distance, every_frame(colour))
    return painted.unflatten(0, (number, frames))
