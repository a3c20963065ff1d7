"""The fixed prompts of the small pipeline: a development and a held-back test split."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmark.small.scenes import labels_scene, parse_prompt, sample_labels, scene_labels

SPLIT_FILE = Path(__file__).parent.parent / "prompts" / "flux.json"
DEVELOPMENT_SIZE = 32
TEST_SIZE = 64


def make_splits(seed: int = 2024) -> dict[str, Any]:
    """Distinct prompts, each with a seed of its own, as `benchmark/prompts/flux.json` has them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_labels(4 * (DEVELOPMENT_SIZE + TEST_SIZE), generator)
    prompts = list(dict.fromkeys(labels_scene(row).prompt for row in drawn))
    entries = [
        {"prompt": prompt, "seed": 1000 + index}
        for index, prompt in enumerate(prompts[: DEVELOPMENT_SIZE + TEST_SIZE])
    ]
    return {
        "schema": 1,
        "development": entries[:DEVELOPMENT_SIZE],
        "test": entries[DEVELOPMENT_SIZE:],
    }


def write_splits(path: Path = SPLIT_FILE) -> None:
    """Writes `make_splits()` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(make_splits(), indent=1) + "\n")


def read_split(name: str, path: Path = SPLIT_FILE) -> list[dict[str, Any]]:
    """The entries `{"prompt", "seed"}` of the split `development` or `test`."""
    splits = json.loads(path.read_text())
    if name not in ("development", "test"):
        raise ValueError(f"name must be development or test, got {name!r}")
    return splits[name]


def held_back_labels() -> torch.Tensor:
    """Label rows [64, 7] of the test split, which no training picture may show."""
    return scene_labels(parse_prompt(entry["prompt"]) for entry in read_split("test"))
