"""What each small classifier understands, and the real pictures that its distance is to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

REAL_PICTURES = 1024
REAL_CLIPS = 512
_CLIPS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """How a family's pictures or clips are judged."""

    judge_class: type
    """Maps pictures or clips to features."""
    shape: tuple[int, ...]
    """Of the only pictures or clips that it takes."""
    check_texts: Callable[[Sequence[str]], Any]
    """`ValueError` if a text is not of the form that it understands."""
    accuracy: Callable[[Any, "Tensor", Sequence[str]], dict[str, float]]
    """(judge, pictures or clips, texts) -> shares ``whole`` and ``attributes``."""
    real: Callable[["Generator"], Iterator["Tensor"]]
    """What a perfect pipeline makes, in batches."""
    real_text: str
    """What those are, for reports."""


def _pictures(draw: Callable[..., tuple["Tensor", "Tensor"]], what: str) -> Judging:
    """Pictures by prompts; ``draw(number, generator)`` gives real ones and their labels."""
    from benchmark.small.judge import Judge
    from benchmark.small.scenes import parse_prompt

    def real(generator: "Generator") -> Iterator["Tensor"]:
        yield draw(REAL_PICTURES, generator)[0]

    return Judging(
        judge_class=Judge,
        shape=(3, 64, 64),
        check_texts=lambda texts: [parse_prompt(text) for text in texts],
        accuracy=Judge.prompt_accuracy,
        real=real,
        real_text=f"{REAL_PICTURES} rendered pictures of {what}",
    )


def scenes() -> Judging:
    """Pictures of one or two objects, by prompts."""
    from benchmark.small.pictures import render
    from benchmark.small.scenes import sample_labels

    def draw(number: int, generator: "Generator") -> tuple["Tensor", "Tensor"]:
        labels = sample_labels(number, generator)
        return render(labels, generator), labels

    return _pictures(draw, "random prompts")


def single_objects() -> Judging:
    """Pictures of one object, by prompts."""
    from benchmark.small.pixart import draw_pictures

    return _pictures(draw_pictures, "one object")


def classes() -> Judging:
    """Pictures of one object before a plain background, by class names."""
    from benchmark.small.dit import accuracy, class_labels, draw_pictures

    judging = _pictures(draw_pictures, "one object before a plain background")
    return replace(judging, check_texts=class_labels, accuracy=accuracy)


def clips(frames: int = 16) -> Judging:
    """Clips of a moving object, by prompts; the real ones are of all motions.

    The classifier looks at the first 16 of their `frames`.
    """
    from benchmark.small.clip_judge import ClipJudge
    from benchmark.small.clips import render_clips
    from benchmark.small.motion import parse_prompt, sample_labels

    def real(generator: "Generator") -> Iterator["Tensor"]:
        for rows in sample_labels(REAL_CLIPS, generator).split(_CLIPS_AT_ONCE):
            yield render_clips(rows, generator, frames)

    return Judging(
        judge_class=ClipJudge,
        shape=(frames, 3, 64, 64),
        check_texts=lambda texts: [parse_prompt(text) for text in texts],
        accuracy=ClipJudge.prompt_accuracy,
        real=real,
        real_text=f"{REAL_CLIPS} rendered clips of random prompts",
    )
