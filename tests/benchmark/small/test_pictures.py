"""The procedural pictures: prompts, drawing, splits."""

import pytest
import torch

from benchmark.small.pictures import PALETTE, SHADE, render
from benchmark.small.scenes import (
    COLOURS,
    Scene,
    labels_scene,
    parse_prompt,
    sample_labels,
    sample_scene,
    scene_labels,
)
from benchmark.small.splits import SPLIT_FILE, make_splits, read_split


def draw(prompts: list[str], seed: int = 0) -> torch.Tensor:
    labels = scene_labels(parse_prompt(prompt) for prompt in prompts)
    return render(labels, torch.Generator().manual_seed(seed))


def mask_of(image: torch.Tensor, colour: str) -> torch.Tensor:
    return (image - PALETTE[COLOURS.index(colour)].view(3, 1, 1)).abs().amax(dim=0) < 1e-3


def test_prompts_and_labels_give_the_scene_back():
    generator = torch.Generator().manual_seed(0)
    for row in sample_labels(200, generator):
        scene = labels_scene(row)
        assert parse_prompt(scene.prompt) == scene
        assert torch.equal(scene_labels([scene])[0], row)


def test_a_seed_decides_the_scene():
    scenes = [sample_scene(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert scenes[0] == scenes[1]


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a pink circle on a white plain background",
        "a red circle on a red plain background",
        "a red circle on a white dotted background",
    ],
)
def test_a_prompt_outside_the_grammar_raises(prompt):
    with pytest.raises(ValueError):
        parse_prompt(prompt)


def test_a_scene_needs_one_or_two_objects():
    with pytest.raises(ValueError, match="objects"):
        Scene(objects=(), background="red", pattern="plain")


def test_drawing_is_deterministic_and_in_range():
    labels = sample_labels(32, torch.Generator().manual_seed(1))
    first, second, other = (render(labels, torch.Generator().manual_seed(s)) for s in (2, 2, 3))
    assert first.shape == (32, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_two_objects_are_left_and_right_in_the_prompt_order():
    for seed in range(8):
        image = draw(["a red circle and a blue square on a white plain background"], seed)[0]
        red, blue = mask_of(image, "red"), mask_of(image, "blue")
        assert red.sum() > 150 and blue.sum() > 150
        assert not red[:, 32:].any()
        assert not blue[:, :31].any()


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_a_single_object_covers_the_middle_and_no_corner(shape):
    image = draw([f"a yellow {shape} on a blue plain background"])[0]
    yellow = mask_of(image, "yellow")
    assert yellow[28:36, 28:36].any()
    assert mask_of(image, "blue")[[0, 0, -1, -1], [0, -1, 0, -1]].all()


def test_shapes_differ_in_how_they_fill_their_box():
    filled = {}
    for shape in ("circle", "square", "triangle", "cross"):
        mask = mask_of(draw([f"a red {shape} on a white plain background"])[0], "red")
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        filled[shape] = (mask.sum() / (rows * columns)).item()
    assert filled["square"] > 0.95
    assert 0.7 < filled["circle"] < 0.85
    assert 0.5 < filled["cross"] < 0.68
    assert 0.4 < filled["triangle"] < 0.6


def test_patterns_alternate_the_background_with_its_shade():
    prompts = [f"a red circle on a green {p} background" for p in ("plain", "striped", "checkered")]
    images = draw(prompts)
    green = PALETTE[COLOURS.index("green")].view(3, 1)
    edges = images[:, :, :, 0], images[:, :, 0, :]
    bright = [[(e - green).abs().amax(dim=0) < 1e-3 for e in edge] for edge in edges]
    dark = [[(e - SHADE * green).abs().amax(dim=0) < 1e-3 for e in edge] for edge in edges]
    assert all(side[0].all() for side in bright)
    assert bright[0][1].any() and dark[0][1].any()
    assert bright[1][1].all() or dark[1][1].all() or not (bright[1][1].any() and dark[1][1].any())
    assert all(side[2].any() for side in (*bright, *dark))


def test_excluded_scenes_are_never_drawn():
    exclude = sample_labels(500, torch.Generator().manual_seed(0))
    drawn = sample_labels(3000, torch.Generator().manual_seed(0), exclude=exclude)
    kept = {tuple(row.tolist()) for row in drawn}
    assert len(drawn) == 3000
    assert kept.isdisjoint(tuple(row.tolist()) for row in exclude)


def test_the_split_file_is_what_the_code_makes():
    splits = make_splits()
    assert read_split("development", SPLIT_FILE) == splits["development"]
    assert read_split("test", SPLIT_FILE) == splits["test"]


def test_splits_are_disjoint_in_prompts_and_seeds():
    splits = make_splits()
    assert len(splits["development"]) == 32 and len(splits["test"]) == 64
    entries = splits["development"] + splits["test"]
    assert len({entry["prompt"] for entry in entries}) == 96
    assert len({entry["seed"] for entry in entries}) == 96


def test_an_unknown_split_raises():
    with pytest.raises(ValueError, match="development or test"):
        read_split("training")
