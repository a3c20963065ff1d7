"""Model families the benchmark can run: the pipeline's class and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkFamily:
    """How to load and call the pipelines of one family."""

    pipeline_class: str
    """Name of the class in diffusers."""
    picture_size: Callable[[Any], int]
    """Pipeline -> the side of its pictures in pixels, if no other is asked for."""
    call_options: Callable[[Any], dict[str, Any]]
    """Pipeline -> further arguments of every call."""


FAMILIES = {
    "flux": BenchmarkFamily(
        pipeline_class="FluxPipeline",
        picture_size=lambda pipe: pipe.vae.config.sample_size,
        call_options=lambda pipe: {
            "max_sequence_length": min(512, pipe.tokenizer_2.model_max_length)
        },
    ),
}
