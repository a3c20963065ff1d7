"""A transformer's blocks as a cache sees them: bound arguments, streams, and counted FLOPs."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from xfuser_adacorr.core.flops import count_flops

from .diffusers_adapters.registry import BlockList, ModelFamily, Streams
from .methods.base import BlockCall


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Signature of ``module.forward`` as it was written, without ``self``.

    Some models choose their forward per instance; offloading hooks put wrappers in its place.
    """
    forward = module.__dict__.get("forward")
    while forward is not None and not inspect.ismethod(forward):
        forward = getattr(forward, "__wrapped__", None)
    if forward is not None and forward.__self__ is module:
        return _signature(forward.__func__)
    return _signature(type(module).forward)


def bind_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``module.forward`` by name, however they were passed."""
    signature = forward_signature(module)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def sample_of(output: Any) -> Tensor:
    """The sample in what a transformer returned: a tensor, a tuple, or a diffusers output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def block_stack(transformer: nn.Module, family: ModelFamily) -> list[tuple[nn.Module, BlockList]]:
    """All blocks in the order they run, each with the description of its list.

    Raises `ValueError` if lists that run in turns differ in length.
    """
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
    """Reads and writes the streams of blocks, whether apart or in one joint sequence."""

    def __init__(self, output_stream: str) -> None:
        self._output_stream = output_stream
        self._lengths: dict[str, int] = {}
        """Tokens of each stream in this call, but for the output stream, which has the rest."""

    def read_arguments(self, block_list: BlockList, arguments: Mapping[str, Any]) -> Streams:
        if block_list.joint is not None:
            return self._split(arguments[block_list.joint], block_list.streams)
        streams = {name: arguments[name] for name in block_list.streams}
        for name, x in streams.items():
            if name != self._output_stream:
                self._lengths[name] = x.shape[1]
        return streams

    def write_arguments(self, block_list: BlockList, streams: Streams) -> dict[str, Tensor]:
        if block_list.joint is None:
            return streams
        return {block_list.joint: self._join(streams, block_list.streams)}

    def read_result(self, block_list: BlockList, result: Any) -> Streams:
        if block_list.joint is not None:
            return self._split(result, block_list.returns)
        result = result if isinstance(result, tuple) else (result,)
        return dict(zip(block_list.returns, result, strict=True))

    def write_result(self, block_list: BlockList, streams: Streams) -> Any:
        if block_list.joint is not None:
            return self._join(streams, block_list.returns)
        returned = tuple(streams[name] for name in block_list.returns)
        return returned if len(returned) > 1 else returned[0]

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


class BlockRunner:
    """Turns calls of the blocks into `BlockCall`, and counts the FLOPs of those executed."""

    def __init__(self, transformer: nn.Module, family: ModelFamily) -> None:
        self.stack = block_stack(transformer, family)
        self.layout = StreamLayout(family.output_stream)
        self.executed_flops = 0
        """FLOPs since it was last set to 0."""
        self._flops: dict[tuple, int] = {}

    def call(
        self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict
    ) -> BlockCall:
        """The call of block ``index``; nothing is executed yet."""
        block, block_list = self.stack[index]
        arguments = bind_arguments(block, args, kwargs)
        streams = self.layout.read_arguments(block_list, arguments)
        once: list[Streams] = []

        def run(**overrides: Any) -> Streams:
            if once and not overrides:
                return once[0]
            changed = {name: overrides.pop(name) for name in streams if name in overrides}
            if changed:
                changed = self.layout.write_arguments(block_list, {**streams, **changed})
            result = self._execute(index, original, arguments | overrides | changed)
            out = self.layout.read_result(block_list, result)
            if not (overrides or changed):
                once.append(out)
            return out

        return BlockCall(index, len(self.stack), block, arguments | streams, streams, run)

    def result(self, index: int, out: Streams) -> Any:
        """What block ``index`` returns for these streams."""
        return self.layout.write_result(self.stack[index][1], out)

    def _execute(self, index: int, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a block; its FLOPs are measured when its input sizes are first seen."""
        key = (index, *((name, _size(value)) for name, value in arguments.items()))
        if key in self._flops:
            result = original(**arguments)
        else:
            result, self._flops[key] = count_flops(original, **arguments)
        self.executed_flops += self._flops[key]
        return result


def _size(value: Any) -> tuple[int, ...] | int | None:
    """What of an argument decides how much is computed: a shape, or a number of frames."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value if isinstance(value, int) else None
