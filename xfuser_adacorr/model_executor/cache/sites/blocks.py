"""A transformer's blocks as a cache sees them: bound arguments, and streams."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import (
    BlockList,
    ModelFamily,
    Streams,
    bind_arguments,
)
from xfuser_adacorr.model_executor.cache.diffusers_adapters.generic import resolve_returns
from xfuser_adacorr.model_executor.cache.methods.base import BlockCall


def sample_of(output: Any) -> Tensor:
    """The sample in what a transformer returned: a tensor, a tuple, or a diffusers output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def block_stack(transformer: nn.Module, family: ModelFamily) -> list[tuple[nn.Module, BlockList]]:
    """All blocks in the order they run, each with the description of its list.

    Raises `ValueError` if the model has not the lists that the family names, and if lists that run
    in turns differ in length.
    """
    for each in family.block_lists:
        blocks = getattr(transformer, each.attribute, None)
        if not isinstance(blocks, Iterable) or not all(isinstance(x, nn.Module) for x in blocks):
            raise ValueError(
                f"block_lists of family {family.name!r} must name lists of blocks of "
                f"{type(transformer).__name__}, which has no blocks in {each.attribute!r}"
            )
    turns: list[list[BlockList]] = []
    for block_list in family.block_lists:
        if block_list.interleaved:
            turns[-1].append(block_list)
        else:
            turns.append([block_list])
    stack = []
    for lists in turns:
        rows = [[(x, each) for x in getattr(transformer, each.attribute)] for each in lists]
        lengths = {each.attribute: len(row) for each, row in zip(lists, rows, strict=True)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"blocks that run in turns must be equally many, got {lengths}")
        stack += chain.from_iterable(zip(*rows, strict=True))
    return stack


class SplitStreams(dict[str, Tensor]):
    """Streams that are views of one sequence; unchanged, they need not be joined again."""

    def __init__(self, streams: Streams, sequence: Tensor) -> None:
        super().__init__(streams)
        self.sequence = sequence


class StreamLayout:
    """Reads and writes the streams of blocks, in whatever form their lists have them."""

    def __init__(self, output_stream: str) -> None:
        self._output_stream = output_stream
        self._lengths: dict[str, int] = {}
        """Tokens of each stream in this call, but for the output stream, which has the rest."""
        self._frames = 0
        """Of the output stream in this call, where a list has them as tokens."""
        self._tokens = 0
        """A frame's, likewise."""
        self._packed: list[torch.Size] = []
        """Shapes of what is packed into the output stream of this call."""

    def read_arguments(self, block_list: BlockList, arguments: Mapping[str, Any]) -> Streams:
        if block_list.joint is not None:
            return self._split(arguments[block_list.joint], block_list.streams)
        streams = {name: arguments[name] for name in block_list.streams}
        for name, x in streams.items():
            if name != self._output_stream:
                self._lengths[name] = x.shape[1]
        output = streams[self._output_stream]
        if block_list.transposed:
            self._frames = output.shape[1]
        else:
            self._tokens = output.shape[1]
        parts = [output, *(arguments[name] for name in block_list.packed)]
        self._packed = [x.shape for x in parts]
        return {**streams, self._output_stream: self._read_output(block_list, parts)}

    def write_arguments(self, block_list: BlockList, streams: Streams) -> dict[str, Tensor]:
        if block_list.joint is not None:
            return {block_list.joint: self._join(streams, block_list.streams)}
        return {**streams, **self._write_output(block_list, streams[self._output_stream])}

    def read_result(
        self, block_list: BlockList, result: Any, given: Streams | None = None
    ) -> Streams:
        """The streams in a block's result; one that it drops (None) stays as it was ``given``."""
        if block_list.joint is not None:
            return self._split(result, block_list.returns)
        result = result if isinstance(result, (tuple, list)) else (result,)
        if len(result) != len(block_list.returns):
            raise ValueError(
                f"{block_list.attribute}: returns must name what its blocks return, got "
                f"{list(block_list.returns)} for {len(result)} values"
            )
        named = dict(zip(block_list.returns, result, strict=True))
        if named.get(None) is not None:
            raise ValueError(
                f"{block_list.attribute}: a block returns a stream that it did not return at the "
                "first call of the run; reset the cache where a run takes other arguments"
            )
        parts = [named.pop(name) for name in (self._output_stream, *block_list.packed)]
        out = {name: given[name] if x is None and given else x for name, x in named.items() if name}
        return {self._output_stream: self._read_output(block_list, parts), **out}

    def write_result(self, block_list: BlockList, streams: Streams) -> Any:
        if block_list.joint is not None:
            return self._join(streams, block_list.returns)
        streams = self.write_arguments(block_list, streams)
        returned = tuple(streams[name] if name else None for name in block_list.returns)
        return returned if len(returned) > 1 else returned[0]

    def _read_output(self, block_list: BlockList, parts: list[Tensor]) -> Tensor:
        """The output stream in the form that all lists share."""
        if block_list.packed:
            return torch.cat([x.flatten(1) for x in parts], dim=1).unsqueeze(1)
        return _transposed(parts[0], self._tokens) if block_list.transposed else parts[0]

    def _write_output(self, block_list: BlockList, output: Tensor) -> dict[str, Tensor]:
        """The output stream, and what is packed into it, as the blocks of the list have them."""
        names = (self._output_stream, *block_list.packed)
        if block_list.packed:
            sizes = [shape[1:].numel() for shape in self._packed]
            parts = output.squeeze(1).split(sizes, dim=1)
            pairs = zip(names, parts, self._packed, strict=True)
            return {name: part.view(shape) for name, part, shape in pairs}
        return {names[0]: _transposed(output, self._frames) if block_list.transposed else output}

    def _split(self, sequence: Tensor, names: tuple[str, ...]) -> SplitStreams:
        others = sum(self._lengths[name] for name in names if name != self._output_stream)
        rest = sequence.shape[1] - others
        lengths = [rest if name == self._output_stream else self._lengths[name] for name in names]
        parts = sequence.split(lengths, dim=1)
        return SplitStreams(dict(zip(names, parts, strict=True)), sequence)

    @staticmethod
    def _join(streams: Streams, names: tuple[str, ...]) -> Tensor:
        if isinstance(streams, SplitStreams):
            return streams.sequence
        return torch.cat([streams[name] for name in names], dim=1)


def _transposed(x: Tensor, tokens: int) -> Tensor:
    """``[B*tokens, T, D]`` -> ``[B*T, tokens, D]``."""
    return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


class BlockRunner:
    """Turns calls of the blocks into `BlockCall`, and tells which are executed.

    Where the family does not say what its blocks return, the first call of each list, which is
    always a computed one, tells (`resolve_returns`).
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily) -> None:
        self._described = self.stack = block_stack(transformer, family)
        self.layout = StreamLayout(family.output_stream)
        self._owner = type(transformer).__name__
        self._output_stream = family.output_stream
        self._due = 0
        """Index of the block whose turn it is."""
        self._shape: torch.Size | None = None
        """Of the output stream at the first block of this call."""
        self._returned: Streams | None = None
        """Streams after the block before, as long as lists are left to be resolved."""

    @property
    def block_lists(self) -> tuple[BlockList, ...]:
        """The lists of blocks, with what is known of their streams by now."""
        return tuple({each.attribute: each for _, each in self.stack}.values())

    def begin_run(self) -> None:
        """A run of other inputs may begin: its first call tells anew what was not described."""
        self.stack = self._described

    def call(
        self,
        index: int,
        original: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        executed: Callable[[float], None] = lambda share: None,
    ) -> BlockCall:
        """The call of block ``index``; a block of a list that is not resolved yet is executed.

        ``executed(share)`` is told when it is: the share of the tokens that went through.
        Raises `ValueError` for blocks that run in another order than the lists', and for what
        `resolve_returns` refuses.
        """
        self._take_turn(index)
        block, block_list = self.stack[index]
        arguments = bind_arguments(block, args, kwargs)
        once: list[Streams] = []
        if block_list.returns is None:
            result = original(**arguments)
            executed(1.0)
            block_list = self._resolve(block_list, arguments, result)
            streams = self._read(index, block_list, arguments)
            once.append(self.layout.read_result(block_list, result, streams))
            self._check_shape(index, once[0])
        else:
            streams = self._read(index, block_list, arguments)

        def run(**overrides: Any) -> Streams:
            if once and not overrides:
                return once[0]
            changed = {name: overrides.pop(name) for name in streams if name in overrides}
            share = 1.0
            if changed:
                kept = {**streams, **changed}
                stream = self._output_stream
                share = kept[stream].shape[1] / streams[stream].shape[1]
                changed = self.layout.write_arguments(block_list, kept)
            result = original(**(arguments | overrides | changed))
            executed(share)
            out = self.layout.read_result(block_list, result, streams)
            if not (overrides or changed):
                self._check_shape(index, out)
                once.append(out)
            return out

        seen = arguments if block_list.packed else arguments | streams
        return BlockCall(index, len(self.stack), block, seen, streams, run)

    def result(self, index: int, out: Streams) -> Any:
        """What block ``index`` returns for these streams."""
        if any(each.returns is None for _, each in self.stack[index + 1 :]):
            self._returned = out
        return self.layout.write_result(self.stack[index][1], out)

    def _take_turn(self, index: int) -> None:
        if index not in (0, self._due):
            raise ValueError(
                f"{self._owner}: block {index} of the stack was called where it was the turn of "
                f"block {self._due}; blocks have to run in the order of "
                f"{', '.join(dict.fromkeys(each.attribute for _, each in self.stack))}"
            )
        self._due = index + 1

    def _resolve(self, block_list: BlockList, arguments: dict[str, Any], result: Any) -> BlockList:
        before, self._returned = self._returned, None
        try:
            resolved = resolve_returns(block_list, arguments, result, before)
        except ValueError as error:
            raise ValueError(f"{self._owner}: {error}") from error
        self.stack = [
            (block, resolved if each is block_list else each) for block, each in self.stack
        ]
        return resolved

    def _read(self, index: int, block_list: BlockList, arguments: dict[str, Any]) -> Streams:
        streams = self.layout.read_arguments(block_list, arguments)
        if index == 0:
            self._shape = streams[self._output_stream].shape
        return streams

    def _check_shape(self, index: int, out: Streams) -> None:
        """A residual of the whole stack needs an output stream that keeps its shape."""
        shape = out[self._output_stream].shape
        if index == len(self.stack) - 1 and shape != self._shape:
            raise ValueError(
                f"{self._owner}: {self._output_stream} goes into the stack as {list(self._shape)} "
                f"and comes out as {list(shape)}"
            )
