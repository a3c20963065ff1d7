"""What is measured around calls of a transformer and steps of a scheduler; compiled blocks."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters

HOST_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")
"""Methods of a tensor that wait for its device."""


def drain(device: torch.device) -> None:
    """Wait for everything that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def around(x: Any, method: str, handler: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Answer a method's calls by ``handler(call)``, outside of everything installed on ``x``."""
    cls = type(x)
    original = getattr(cls, method)

    @wraps(original)  # pipelines look at the signature of a scheduler's step
    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(partial(original, self, *args, **kwargs))

    x.__class__ = type(cls)(cls.__name__, (cls,), {method: answer})
    try:
        yield
    finally:
        x.__class__ = cls


@contextmanager
def measured_calls(pipe: Any, measure: Callable[[Callable[[], Any]], tuple]) -> Iterator[list]:
    """What ``measure(call) -> (output, value)`` finds in each call of the transformer.

    The scheduler's steps count to the call before: caches decide and correct in them too.
    """
    values: list[Any] = []

    def of_call(call: Callable[[], Any]) -> Any:
        output, value = measure(call)
        values.append(value)
        return output

    def of_step(call: Callable[[], Any]) -> Any:
        output, value = measure(call)
        values[-1] += value
        return output

    with around(pipe.transformer, "__call__", of_call), around(pipe.scheduler, "step", of_step):
        yield values


@contextmanager
def timed_calls(pipe: Any) -> Iterator[list[float]]:
    """Seconds of each call and the step after it, with the device drained before and after."""
    device = pipe.transformer.device

    def measure(call: Callable[[], Any]) -> tuple[Any, float]:
        drain(device)
        start = time.perf_counter()
        output = call()
        drain(device)
        return output, time.perf_counter() - start

    with measured_calls(pipe, measure) as seconds:
        yield seconds


@contextmanager
def calls_marked_as_steps(transformer: nn.Module) -> Iterator[None]:
    """Tell CUDA graphs that each call begins anew, so that one call's blocks are one run."""

    def marked(call: Callable[[], Any]) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    with around(transformer, "__call__", marked):
        yield


@contextmanager
def synchronising_calls(pipe: Any) -> Iterator[list[int]]:
    """How often the host waits for the device within each call and the step after it.

    On a GPU as PyTorch's synchronisation warnings tell it (reads, copies from pageable memory); on
    a CPU the reads of tensors that would wait.
    """
    with _host_waits(pipe.transformer.device) as waited:

        def measure(call: Callable[[], Any]) -> tuple[Any, int]:
            before = len(waited())
            return call(), len(waited()) - before

        with measured_calls(pipe, measure) as counts:
            yield counts


@contextmanager
def _host_waits(device: torch.device) -> Iterator[Callable[[], Sequence]]:
    if device.type != "cuda":
        with _counted_reads() as reads:
            yield lambda: reads
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _counted_reads() -> Iterator[list[str]]:
    reads: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return original(tensor, *args, **kwargs)

        return read

    with ExitStack() as stack:
        for name in HOST_READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counted(name)))
        yield reads


@contextmanager
def computing_calls(transformer: nn.Module, block: nn.Module) -> Iterator[list[bool]]:
    """Whether each call runs the attention of ``block``; compiled blocks run uncompiled here."""
    computed: list[bool] = []
    runs: list[None] = []
    inside = next(m for m in block.attn.modules() if isinstance(m, nn.Linear))
    handle = inside.register_forward_hook(lambda *_: runs.append(None))

    def noted(call: Callable[[], Any]) -> Any:
        runs.clear()
        output = call()
        computed.append(bool(runs))
        return output

    try:
        with torch.compiler.set_stance("force_eager"), around(transformer, "__call__", noted):
            yield computed
    finally:
        handle.remove()


def allocated(device: torch.device) -> int | None:
    """Bytes of tensors on a GPU now; None on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Afterwards the most bytes of tensors held at once on a GPU; nothing on a CPU."""
    peak: list[int] = []
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device))


def graph_counts() -> tuple[int, int]:
    """Graphs compiled, and graph breaks met, by this process."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def middle_block(transformer: nn.Module) -> nn.Module:
    """A block well inside the stack, which every cache skips on the calls that it reuses."""
    blocks = _repeated_blocks(transformer)
    return blocks[
        3 * len(blocks) // 4
    ]  # in the second of two lists, whether they take turns or not


def _repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    names = transformer._repeated_blocks
    return [module for module in transformer.modules() if type(module).__name__ in names]


class CompiledBlocks:
    """The compiled forms of a model's blocks, which rows take turns in using.

    As `compile_repeated_blocks` compiles them, but kept: compiling anew for every row would
    measure the compiler.
    """

    def __init__(self, transformer: nn.Module, mode: str) -> None:
        self._blocks = [] if mode == "eager" else _repeated_blocks(transformer)
        self._options: dict[str, Any] = {}
        if transformer.device.type != "cuda":
            self._options["backend"] = "eager"
        elif mode == "cudagraphs":
            self._options["mode"] = "reduce-overhead"
        self._forms: dict[bool, list[Any]] = {}

    @contextmanager
    def used(self, fullgraph: bool) -> Iterator[None]:
        """Blocks run compiled; with ``fullgraph`` whatever breaks a graph raises."""
        if fullgraph not in self._forms:
            self._forms[fullgraph] = [self._compile(block, fullgraph) for block in self._blocks]
        for block, form in zip(self._blocks, self._forms[fullgraph], strict=True):
            block._compiled_call_impl = form
        try:
            yield
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None

    def _compile(self, block: nn.Module, fullgraph: bool) -> Any:
        block.compile(fullgraph=fullgraph, **self._options)
        return block._compiled_call_impl
