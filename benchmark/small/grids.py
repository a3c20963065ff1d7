"""Writes batches of pictures as one PNG file."""

from pathlib import Path

import torch
from PIL import Image


def save_grid(images: torch.Tensor, path: Path, columns: int = 8, gap: int = 2) -> None:
    """Writes images [N, 3, H, W] in [0, 1] as a grid with `columns` pictures a row."""
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    grid = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images.float().clamp(0, 1).cpu()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def clip_rows(clips: torch.Tensor) -> torch.Tensor:
    """Every second frame of clips [N, 16, 3, H, W], [8 N, 3, H, W]: a row of a grid is a clip."""
    return clips[:, ::2].flatten(0, 1)
