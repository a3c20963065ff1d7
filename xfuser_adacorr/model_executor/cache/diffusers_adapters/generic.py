"""Families of transformers that nobody described: inferred from their structure.

Lists of blocks are known by the names that diffusers uses. Which streams a block takes and returns,
and in which order, is seen at the first computed call (`resolve_returns`).
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from .family import (
    STARTING_THRESHOLDS,
    BlockList,
    ModelFamily,
    Streams,
    bind_arguments,
    forward_signature,
)

BLOCK_LISTS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "visual_transformer_blocks",
    "double_blocks",
    "double_stream_blocks",
    "spatial_blocks",
    "blocks",
    "layers",
    "single_transformer_blocks",
    "single_blocks",
    "single_stream_blocks",
)
"""Attributes with the blocks of a stack, in the order in which they run. Refiners and blocks of the
text alone are not among them: they run before the stack, in every call."""

INTERLEAVED = {
    "transformer_blocks": "temporal_transformer_blocks",
    "spatial_blocks": "temporal_blocks",
}
"""Lists whose blocks run in turns with those of another one."""

LATENTS = ("hidden_states", "sample", "x", "img")
TIMESTEPS = ("timestep", "timesteps", "t")
TEXT = ("encoder", "context", "text", "txt", "prompt", "caption")
"""Beginnings of the names of streams that the model's head does not read. Others are latents, which
are reused together with the output stream."""


def infer_family(transformer: nn.Module) -> ModelFamily:
    """Describe a transformer by what its structure tells; ``returns`` are found when it runs.

    Raises `ValueError`, naming the class and the reason, for a transformer whose blocks, latents or
    timestep cannot be told.
    """
    name = type(transformer).__name__
    attributes = _block_attributes(transformer)
    stream = _output_stream(getattr(transformer, attributes[0])[0])
    return ModelFamily(
        name=name,
        transformer_class=name,
        block_lists=tuple(
            BlockList(
                attribute=attribute,
                streams=(stream,),
                returns=None,
                interleaved=attribute in INTERLEAVED.values(),
            )
            for attribute in attributes
        ),
        latents=_forward_argument(transformer, LATENTS, "latents"),
        timestep=_forward_argument(transformer, TIMESTEPS, "timestep"),
        output_stream=stream,
        thresholds=STARTING_THRESHOLDS,
        full_noise_timestep=full_noise_timestep(transformer),
    )


def timestep_fraction(transformer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The timestep of a call over that at pure noise, read from the device; None if it has none."""
    arguments = bind_arguments(transformer, args, kwargs)
    given = [arguments[name] for name in TIMESTEPS if arguments.get(name) is not None]
    if not given:
        return None
    return float(torch.as_tensor(given[0]).amax()) / full_noise_timestep(transformer)


def _block_attributes(transformer: nn.Module) -> list[str]:
    """Names of the lists of blocks, in the order in which they run."""
    found = []
    for attribute in BLOCK_LISTS:
        if not _is_stack(getattr(transformer, attribute, None)):
            continue
        found.append(attribute)
        partner = INTERLEAVED.get(attribute)
        if partner is not None and _is_stack(getattr(transformer, partner, None)):
            found.append(partner)
    if not found:
        raise ValueError(
            f"{type(transformer).__name__} has no list of blocks under a known name; known are "
            f"{', '.join((*BLOCK_LISTS, *INTERLEAVED.values()))}"
        )
    return found


def _is_stack(blocks: Any) -> bool:
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0


def _output_stream(block: nn.Module) -> str:
    """The argument of a block with the latents' tokens: ``hidden_states``, or its first one."""
    names = list(forward_signature(block).parameters)
    if not names:
        raise ValueError(f"blocks of class {type(block).__name__} take no arguments")
    return "hidden_states" if "hidden_states" in names else names[0]


def _forward_argument(transformer: nn.Module, names: Sequence[str], meaning: str) -> str:
    parameters = forward_signature(transformer).parameters
    for name in names:
        if name in parameters:
            return name
    taken = ", ".join(list(parameters)[:6]) + (", ..." if len(parameters) > 6 else "")
    raise ValueError(
        f"the forward of {type(transformer).__name__} has no argument for the {meaning}: it takes "
        f"{taken}; known names are {', '.join(names)}"
    )


def full_noise_timestep(transformer: nn.Module) -> float:
    """Timestep that a transformer takes at pure noise: 1 if it scales its timestep by 1000.

    Of a model that embeds its timestep as it is given, 1000 is a guess; it is needed where no
    scheduler is known.
    """
    try:
        source = inspect.getsource(type(transformer).forward)
    except OSError:  # a class that was typed in
        source = ""
    timed = [m for m in transformer.modules() if re.search("time", type(m).__name__, re.IGNORECASE)]
    factors = [
        getattr(module, name, None)
        for module in (transformer, *timed)
        for name in ("scale", "t_scale", "time_factor")
    ]
    is_scaled = re.search(r"time\w*\b[^\n]*\* 1000\b", source) or 1000 in factors
    return 1.0 if is_scaled else 1000.0


# -- the first computed call ----------------------------------------------------------------------


def resolve_returns(
    block_list: BlockList, arguments: Mapping[str, Any], result: Any, before: Streams | None
) -> BlockList:
    """``block_list`` with the streams that its first block was seen to take and return.

    Args:
        block_list: one with ``returns=None``, whose only stream is the output stream.
        arguments: the block's arguments by name.
        result: what it returned for them.
        before: streams that the block before it returned; None at the start of the stack.

    Raises `ValueError` if what is returned does not continue what is given, or what is given not
    what the block before returned.
    """
    stream = block_list.streams[0]
    results = result if isinstance(result, (tuple, list)) else (result,)
    returns = _returned_streams(block_list, arguments, results)
    latents = [name for name in returns if name and not name.startswith(TEXT)]
    packed = tuple(name for name in latents if name != stream)
    streams = tuple(name for name in returns if name and name not in packed)
    found = replace(block_list, streams=streams, returns=returns, packed=packed)
    x = arguments[stream]
    if before is None or found.packed or x.shape == before[stream].shape:
        return found
    if block_list.interleaved and _is_transposed(x, before[stream]):
        return replace(found, transposed=True)
    names = _joined_streams(block_list, x, before, stream)
    if len(results) > 1:
        raise ValueError(
            f"{block_list.attribute}: its blocks take one sequence of {', '.join(names)}, but "
            f"return {len(results)} values"
        )
    return replace(block_list, streams=names, returns=names, joint=stream)


def _returned_streams(
    block_list: BlockList, arguments: Mapping[str, Any], results: Sequence[Any]
) -> tuple[str | None, ...]:
    """Names of the arguments that the results continue, in the results' order; None for a None.

    A result has the shape of the argument that it continues; where several have, it is the nearest
    one, since blocks add to their streams.
    """
    stream = block_list.streams[0]
    given = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    }
    if stream not in given:
        raise ValueError(f"{block_list.attribute}: {stream} is not a tensor of tokens")
    returned = [x for x in results if x is not None]
    if not all(isinstance(x, Tensor) for x in returned):
        raise ValueError(
            f"{block_list.attribute}: its blocks return {[type(x).__name__ for x in results]}, "
            "where streams are tensors"
        )
    if len(returned) == 1:
        given = {stream: given[stream]}
    fitting = [
        names
        for names in permutations(given, len(returned))
        if stream in names
        and all(given[name].shape == x.shape for name, x in zip(names, returned, strict=True))
    ]
    if not fitting:
        raise ValueError(
            f"{block_list.attribute}: its blocks return {[_shape(x) for x in results]}, which do "
            f"not continue { ({name: _shape(x) for name, x in given.items()}) }"
        )
    names = fitting[0]
    if len(fitting) > 1:  # only then values are read, which a device has to wait for
        names = min(fitting, key=lambda names: _distance([given[name] for name in names], returned))
    found = iter(names)
    return tuple(None if x is None else next(found) for x in results)


def _distance(given: Sequence[Tensor], returned: Sequence[Tensor]) -> float:
    """Sum of the relative changes from what was given to what was returned."""
    pairs = [(start.float(), x.float()) for start, x in zip(given, returned, strict=True)]
    return sum(float((x - start).norm() / start.norm().clamp_min(1e-12)) for start, x in pairs)


def _is_transposed(x: Tensor, before: Tensor) -> bool:
    """Whether ``[B*T, S, D]`` before has become ``[B*S, T, D]``."""
    tokens = before.shape[1]
    return (
        x.ndim == before.ndim == 3
        and x.numel() == before.numel()
        and x.shape[0] % tokens == 0
        and before.shape[0] * tokens == x.shape[0] * x.shape[1]
    )


def _joined_streams(
    block_list: BlockList, x: Tensor, before: Streams, stream: str
) -> tuple[str, ...]:
    """The streams before in the order in which ``x`` holds them, one after the other."""
    tokens = before[stream].shape[1]
    others = tuple(name for name in before if name != stream)
    added = sum(before[name].shape[1] for name in others)
    if len(others) == 1 and x.shape[1] == tokens + added:
        if torch.equal(x[:, -tokens:], before[stream]):
            return (*others, stream)
        if torch.equal(x[:, :tokens], before[stream]):
            return (stream, *others)
    raise ValueError(
        f"{block_list.attribute}: its first block takes {stream} {_shape(x)}, which is neither a "
        f"stream nor the sequence of streams { ({k: _shape(v) for k, v in before.items()}) } that "
        "the block before returned"
    )


def _shape(x: Any) -> Any:
    return list(x.shape) if isinstance(x, Tensor) else x
