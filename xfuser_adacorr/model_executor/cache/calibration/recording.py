"""Watching the blocks of a model in full runs, as methods inside the model see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from xfuser_adacorr.model_executor.cache.api import disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import ModelFamily
from xfuser_adacorr.model_executor.cache.methods.base import (
    BlockCall,
    Decision,
    Read,
    StackMethod,
    Streams,
)
from xfuser_adacorr.model_executor.cache.methods.options import Method
from xfuser_adacorr.model_executor.cache.step import Step


class Recorder(StackMethod):
    """Computes every call, and takes notes: a state for each branch of each run."""

    forces_last = False
    family: ModelFamily
    """Of the model that is watched."""

    def decide(self, state: Any, step: Step, read: Read) -> Decision:
        return Decision(True, "base")

    def run_block(self, state: Any, call: BlockCall, decision: Decision) -> Streams:
        out = call.run()
        self.note(state, call, out)
        return out

    def note(self, state: Any, call: BlockCall, out: Streams) -> None:
        """A block has turned ``call.streams`` into ``out``."""

    def returned(self, output: Any) -> None:
        """The model has returned ``output``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording(Method):
    """A recorder in the place of a method."""

    label: ClassVar[str] = "Recording"
    num_steps: ClassVar[None] = None

    recorder: Recorder

    @property
    def needs_blocks(self) -> bool:
        return True

    @property
    def answers_steps(self) -> bool:
        return False

    def make_stack(self, model: nn.Module, family: ModelFamily) -> Recorder:
        self.recorder.family = family
        return self.recorder

    def to_dict(self) -> dict[str, Any]:
        return {}


@contextmanager
def recorded(recorder: Recorder, x: Any, model: nn.Module, **options: Any) -> Iterator[None]:
    """Have ``recorder`` watch ``model``, which is ``x`` or one of the pipeline ``x``.

    ``options`` are those of `enable_cache`.
    """
    enable_cache(x, Recording(recorder=recorder), **options)
    handle = model.register_forward_hook(lambda _, args, output: recorder.returned(output))
    try:
        yield
    finally:
        handle.remove()
        disable_cache(x)
