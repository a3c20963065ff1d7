"""The fixed prompts of the small pipelines: a development and a held-back test split for each."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmark.small.motion import MovingScene, labels_moving, moving_labels, reversed_motion
from benchmark.small.motion import parse_prompt as parse_moving
from benchmark.small.motion import sample_labels as sample_moving
from benchmark.small.scenes import (
    COLOURS,
    SHAPES,
    labels_scene,
    parse_prompt,
    sample_labels,
    scene_labels,
)

PROMPTS = Path(__file__).parent.parent / "prompts"
SPLIT_FILE = PROMPTS / "flux.json"
DEVELOPMENT_SIZE = 32
TEST_SIZE = 64
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""Names of DiT's classes, by their ids."""

Splits = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entries:
    """Texts (prompts or class names) with their seeds."""

    texts: list[str]
    seeds: list[int]


def make_splits(seed: int = 2024) -> Splits:
    """FLUX's: distinct prompts of one or two objects, each with a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_labels(4 * (DEVELOPMENT_SIZE + TEST_SIZE), generator)
    return _splits("prompt", _distinct(labels_scene(row).prompt for row in drawn), 1000)


def make_single_splits(seed: int, first_seed: int) -> Splits:
    """Distinct prompts of one object."""
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_labels(4 * (DEVELOPMENT_SIZE + TEST_SIZE), generator, single_share=1.0)
    return _splits("prompt", _distinct(labels_scene(row).prompt for row in drawn), first_seed)


def make_dit_splits(seed: int = 2026) -> Splits:
    """Class names, all of them about equally often in each split: the splits differ in seeds."""
    generator = torch.Generator().manual_seed(seed)
    names: list[str] = []
    for size in (DEVELOPMENT_SIZE, TEST_SIZE):
        rounds = -(-size // len(CLASSES))
        orders = [torch.randperm(len(CLASSES), generator=generator) for _ in range(rounds)]
        names += [CLASSES[index] for index in torch.cat(orders)[:size]]
    return _splits("class_label", names, 3000)


def make_clip_splits(seed: int, first_seed: int) -> Splits:
    """Distinct prompts of moving objects, by turns slow and quick."""
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_moving(4 * (DEVELOPMENT_SIZE + TEST_SIZE), generator)
    scenes = dict.fromkeys(labels_moving(row) for row in drawn)
    slow, quick = (
        [scene.prompt for scene in scenes if scene.speed == speed]
        for speed in ("slowly", "quickly")
    )
    prompts = [prompt for pair in zip(slow, quick, strict=False) for prompt in pair]
    return _splits("prompt", prompts, first_seed)


MAKERS: dict[str, Callable[[], Splits]] = {
    "flux": make_splits,
    "pixart": partial(make_single_splits, 2025, 2000),
    "dit": make_dit_splits,
    "opensora": partial(make_clip_splits, 2027, 4000),
    "sd": partial(make_single_splits, 2028, 5000),
    "sd3": partial(make_single_splits, 2029, 6000),
    "wan": partial(make_clip_splits, 2030, 7000),
}


def split_file(family: str) -> Path:
    """Where a family's splits are."""
    return PROMPTS / f"{family}.json"


def write_splits(family: str = "flux") -> None:
    """Writes what the family's maker makes as JSON."""
    path = split_file(family)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(MAKERS[family](), indent=1) + "\n")


def read_split(name: str, path: Path = SPLIT_FILE) -> list[dict[str, Any]]:
    """The entries of the split `development` or `test`.

    An entry is `{"prompt", "seed"}`, or `{"class_label", "seed"}` where a class is asked for.
    """
    splits = json.loads(path.read_text())
    if name not in ("development", "test"):
        raise ValueError(f"name must be development or test, got {name!r}")
    return splits[name]


def read_entries(family: str, name: str, number: int | None = None) -> Entries:
    """The first `number` entries of a family's split, default all."""
    entries = read_split(name, split_file(family))[:number]
    texts = [entry.get("prompt") or entry["class_label"] for entry in entries]
    return Entries(texts, [entry["seed"] for entry in entries])


def held_back_labels(family: str = "flux") -> torch.Tensor:
    """Label rows [64, 7] of a test split of pictures, which no training picture may show."""
    return scene_labels(parse_prompt(text) for text in read_entries(family, "test").texts)


def held_back_motions(family: str = "opensora") -> torch.Tensor:
    """Label rows [128, 6] of a test split of clips, and of the same clips played backwards."""
    scenes: list[MovingScene] = [parse_moving(t) for t in read_entries(family, "test").texts]
    labels = moving_labels(scenes)
    return torch.cat([labels, reversed_motion(labels)])


def _distinct(prompts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(prompts))


def _splits(key: str, texts: list[str], first_seed: int) -> Splits:
    entries = [
        {key: text, "seed": first_seed + index}
        for index, text in enumerate(texts[: DEVELOPMENT_SIZE + TEST_SIZE])
    ]
    return {
        "schema": 1,
        "development": entries[:DEVELOPMENT_SIZE],
        "test": entries[DEVELOPMENT_SIZE:],
    }
