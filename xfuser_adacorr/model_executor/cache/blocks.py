"""A transformer's blocks as a cache sees them: bound arguments, streams, and counted FLOPs."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from xfuser_adacorr.core.flops import count_flops

from .diffusers_adapters.registry import BlockList, ModelFamily, Streams
from .methods.base import BlockCall


@cache
def _forward_signature(cls: type) -> inspect.Signature:
    signature = inspect.signature(getattr(cls, "_intercepts", cls).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def bind_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``module.forward`` by name, however they were passed."""
    signature = _forward_signature(type(module))
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def block_stack(transformer: nn.Module, family: ModelFamily) -> list[tuple[nn.Module, BlockList]]:
    """All blocks in the order they run, each with the description of its list."""
    return [
        (block, block_list)
        for block_list in family.block_lists
        for block in getattr(transformer, block_list.attribute)
    ]


class BlockRunner:
    """Turns calls of the blocks into `BlockCall`, and counts the FLOPs of those executed."""

    def __init__(self, transformer: nn.Module, family: ModelFamily) -> None:
        self.stack = block_stack(transformer, family)
        self.executed_flops = 0
        """FLOPs since it was last set to 0."""
        self._flops: dict[tuple, int] = {}

    def call(
        self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict
    ) -> BlockCall:
        """The call of block ``index``; nothing is executed yet."""
        block, block_list = self.stack[index]
        arguments = bind_arguments(block, args, kwargs)
        streams = {name: arguments[name] for name in block_list.streams}
        once: list[Streams] = []

        def run(**overrides: Any) -> Streams:
            if once and not overrides:
                return once[0]
            shapes = tuple(tuple(x.shape) for x in (streams | overrides).values() if is_tensor(x))
            result = self._execute((index, shapes), original, arguments | overrides)
            result = result if isinstance(result, tuple) else (result,)
            out = dict(zip(block_list.returns, result, strict=True))
            if not overrides:
                once.append(out)
            return out

        return BlockCall(index, len(self.stack), block, arguments, streams, run)

    def result(self, index: int, out: Streams) -> Any:
        """What block ``index`` returns for these streams."""
        returned = tuple(out[name] for name in self.stack[index][1].returns)
        return returned if len(returned) > 1 else returned[0]

    def _execute(self, key: tuple, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a block; its FLOPs are measured when its input shapes are first seen."""
        if key in self._flops:
            result = original(**arguments)
        else:
            result, self._flops[key] = count_flops(original, **arguments)
        self.executed_flops += self._flops[key]
        return result


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
