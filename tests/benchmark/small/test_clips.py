"""The procedural clips: prompts, drawing, splits, and the judge of clips."""

import pytest
import torch

from benchmark.small.clip_judge import ClipJudge
from benchmark.small.clips import FRAMES, PIXELS_A_FRAME, render_clips
from benchmark.small.judge import Judge, load_judge, save_judge
from benchmark.small.motion import (
    DIRECTIONS,
    SPEEDS,
    labels_moving,
    moving_labels,
    parse_prompt,
    reversed_motion,
    sample_labels,
)
from benchmark.small.pictures import PALETTE
from benchmark.small.scenes import COLOURS
from benchmark.small.splits import held_back_motions, read_entries


def draw(prompt: str, seed: int = 0) -> torch.Tensor:
    labels = moving_labels([parse_prompt(prompt)])
    return render_clips(labels, torch.Generator().manual_seed(seed))[0]


def centres(clip: torch.Tensor, colour: str) -> torch.Tensor:
    """Centre of mass (x, y) of the pixels of a colour in each frame, [T, 2]."""
    wanted = PALETTE[COLOURS.index(colour)].view(1, 3, 1, 1)
    mask = ((clip - wanted).abs().amax(dim=1) < 1e-3).float()
    axis = torch.arange(64) + 0.5
    x, y = (mask * axis).sum((1, 2)), (mask * axis[:, None]).sum((1, 2))
    return torch.stack([x, y], dim=1) / mask.sum((1, 2)).unsqueeze(1)


def test_prompts_and_labels_give_the_moving_scene_back():
    for row in sample_labels(200, torch.Generator().manual_seed(0)):
        scene = labels_moving(row)
        assert parse_prompt(scene.prompt) == scene
        assert torch.equal(moving_labels([scene])[0], row)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle on a white plain background",
        "a red circle moves away slowly on a white plain background",
        "a red circle moves left fast on a white plain background",
        "a red circle moves left slowly on a red plain background",
    ],
)
def test_a_prompt_outside_the_grammar_of_clips_raises(prompt):
    with pytest.raises(ValueError):
        parse_prompt(prompt)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_moves_as_the_prompt_says(direction, speed):
    clip = draw(f"a red square moves {direction} {speed} on a white plain background", seed=3)
    assert clip.shape == (FRAMES, 3, 64, 64)
    way = centres(clip, "red")
    mean_velocity = (way[-1] - way[0]) / (FRAMES - 1)
    sign = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[direction]
    expected = torch.tensor(sign) * PIXELS_A_FRAME[SPEEDS.index(speed)]
    assert torch.allclose(mean_velocity, expected, atol=0.1)


def test_the_shape_never_touches_the_border_and_the_background_rests():
    labels = sample_labels(64, torch.Generator().manual_seed(1))
    clips = render_clips(labels, torch.Generator().manual_seed(2))
    assert clips.min() >= 0 and clips.max() <= 1
    border = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]], -1)
    assert torch.equal(border, border[:, :1].expand_as(border))


def test_a_seed_decides_the_clip():
    prompt = "a red square moves left slowly on a white striped background"
    assert torch.equal(draw(prompt, 1), draw(prompt, 1))
    assert not torch.equal(draw(prompt, 1), draw(prompt, 2))


def test_backwards_is_the_opposite_direction():
    rows = moving_labels(
        parse_prompt(f"a red cross moves {d} slowly on a blue plain background") for d in DIRECTIONS
    )
    opposite = [labels_moving(row).direction for row in reversed_motion(rows)]
    assert opposite == ["right", "left", "down", "up"]
    assert torch.equal(reversed_motion(reversed_motion(rows)), rows)


def test_half_of_each_split_of_clips_moves_quickly():
    for split, size in (("development", 32), ("test", 64)):
        scenes = [parse_prompt(text) for text in read_entries("opensora", split).texts]
        assert len(scenes) == size
        assert sum(scene.speed == "quickly" for scene in scenes) == size // 2


def test_held_back_clips_are_not_drawn_backwards_either():
    held_back = {tuple(row.tolist()) for row in held_back_motions()}
    assert held_back == {tuple(row.tolist()) for row in reversed_motion(held_back_motions())}
    drawn = sample_labels(5000, torch.Generator().manual_seed(0), exclude=held_back_motions())
    assert held_back.isdisjoint(tuple(row.tolist()) for row in drawn)


def test_the_clip_judge_starts_from_the_picture_judge_and_can_be_saved(tmp_path):
    torch.manual_seed(0)
    pictures, judge = Judge(width=8, num_features=16).eval(), ClipJudge(8, 16).eval()
    judge.start_from(pictures)
    clips = torch.rand(2, FRAMES, 3, 64, 64)
    frames = judge.frames(2 * clips[0] - 1)
    assert torch.allclose(frames, pictures(clips[0]))
    save_judge(judge, tmp_path)
    loaded = load_judge(tmp_path, ClipJudge)
    assert torch.equal(loaded(clips), judge(clips))
    assert loaded.features(clips).shape == (2, 16)
    quantised = (clips * 255).round().to(torch.uint8)
    assert torch.allclose(loaded(quantised), loaded(quantised / 255), atol=1e-6)


def test_the_clip_judge_counts_attributes_and_whole_prompts(monkeypatch):
    prompts = [
        "a red circle moves left slowly on a white plain background",
        "a blue cross moves up quickly on a green striped background",
    ]
    found = moving_labels(parse_prompt(prompt) for prompt in prompts)
    found[1, 2] = DIRECTIONS.index("down")
    judge = ClipJudge(8, 16)
    monkeypatch.setattr(judge, "predict", lambda clips: found)
    accuracy = judge.prompt_accuracy(torch.zeros(2, FRAMES, 3, 64, 64), prompts)
    assert accuracy == {"attributes": pytest.approx((1 + 5 / 6) / 2), "whole": 0.5}


def test_the_clip_judge_names_what_is_wrong_with_its_arguments():
    judge = ClipJudge(8, 16)
    with pytest.raises(ValueError, match="clips must be"):
        judge(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="do not match"):
        judge.prompt_accuracy(torch.zeros(2, FRAMES, 3, 64, 64), ["a"])


def test_the_clip_judge_looks_at_the_first_16_frames_of_longer_clips():
    torch.manual_seed(0)
    judge = ClipJudge(8, 16).eval()
    clips = torch.rand(2, FRAMES + 1, 3, 64, 64)
    assert torch.equal(judge(clips), judge(clips[:, :FRAMES]))
    with pytest.raises(ValueError, match="clips must be"):
        judge(clips[:, : FRAMES - 1])


def test_longer_clips_move_as_far_a_frame_and_stay_inside_the_picture():
    rows = moving_labels(
        parse_prompt(f"a red square moves {d} quickly on a blue plain background")
        for d in DIRECTIONS
    )
    clips = render_clips(rows, torch.Generator().manual_seed(0), FRAMES + 1)
    red = clips[:, :, 0] > 0.5  # [4, 17, 64, 64]
    seen = red.flatten(0, 1)
    edges = seen[:, 0].any() or seen[:, -1].any() or seen[:, :, 0].any() or seen[:, :, -1].any()
    assert not edges
    places = (red * torch.arange(64.0)).sum((2, 3)) / red.sum((2, 3))  # mean column
    way = (places[:, -1] - places[:, 0]) / FRAMES
    assert way[:2].tolist() == pytest.approx([-PIXELS_A_FRAME[1], PIXELS_A_FRAME[1]], abs=0.1)
    assert way[2:].tolist() == pytest.approx([0.0, 0.0], abs=0.1)
    with pytest.raises(ValueError, match=r"frames must be in 1..17, got 18"):
        render_clips(rows, torch.Generator(), FRAMES + 2)
