"""What peers that act on the residual of the whole block stack share, for the four families.

The blocks run as they are, or the stack's output is made of its input: a peer's `Residual` says
which. The embedders before the blocks and the head behind them always run.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from torch import Tensor, nn

from benchmark.peers.restoring import before_every_picture

BLOCKS = {
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "DiTTransformer2DModel": ("transformer_blocks",),
    "STDiT3Transformer3DModel": ("spatial_blocks", "temporal_blocks"),
}
"""Lists of blocks; of Open-Sora's two the blocks take turns."""


class Residual(Protocol):
    """What a peer does with the stack. A new one is made for every picture."""

    depth: int
    """Blocks that run before it decides: 0 or more."""

    def reused(self, step: int, hidden_states: Tensor, probed: Tensor) -> Tensor | None:
        """The stack's output, or None if its blocks are to run.

        Args:
            hidden_states: the stack's input.
            probed: the output of the first ``depth`` blocks (or the input).
        """

    def computed(self, step: int, hidden_states: Tensor, probed: Tensor, output: Tensor) -> None:
        """The stack has run."""


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which they run."""
    lists = [getattr(transformer, name) for name in BLOCKS[type(transformer).__name__]]
    if hasattr(transformer, "spatial_blocks"):
        return [block for pair in zip(*lists, strict=True) for block in pair]
    return [block for blocks in lists for block in blocks]


class Stack:
    """Runs a `Residual` in a transformer whose pipeline calls it once a step."""

    def __init__(self, pipe: Any, make: Callable[[], Residual]) -> None:
        self.make = make
        self.blocks = blocks_of(pipe.transformer)
        self.pairs = type(pipe.transformer).__name__ == "FluxTransformer2DModel"
        for place, block in enumerate(self.blocks):
            block.forward = self._wrapped(place, block.forward)
        before_every_picture(pipe, self._begin)
        self._begin()

    def _begin(self) -> None:
        self.residual, self.step = self.make(), -1

    def _wrapped(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = len(self.blocks) - 1

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if place == 0:
                self.step += 1
                self.input, self.output = hidden_states, None
            if place == self.residual.depth:
                self.probed = hidden_states
                self.output = self.residual.reused(self.step, self.input, self.probed)
            if self.output is not None:
                given = self.output if place == last else hidden_states
                context = kwargs.get("encoder_hidden_states")
                return (context, given) if self.pairs else given
            result = forward(*args, **kwargs)
            if place == last:
                output = result[1] if isinstance(result, tuple) else result
                self.residual.computed(self.step, self.input, self.probed, output)
            return result

        return run


def enabled_residual(
    make: Callable[[dict[str, Any], Any], Residual],
) -> Callable[..., Callable[[], None]]:
    """(pipeline, options, run) -> what ends it."""

    def enable(pipe: Any, options: dict[str, Any], run: Any) -> Callable[[], None]:
        Stack(pipe, lambda: make(options, run))
        return lambda: None  # the blocks' attributes are restored

    return enable
