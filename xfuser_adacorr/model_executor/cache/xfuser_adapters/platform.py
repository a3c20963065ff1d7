"""xfuser on machines without an accelerator: 0.7 refuses to be imported there, but runs over gloo.

What it needs on a CPU: device queries that answer, the process groups of its sequence parallelism
(which it takes from yunchang on GPUs only), attention by PyTorch alone, sends that gloo can do,
and triton's names while it is imported, though no kernel can run. Ring attention
stays impossible: no CPU attention returns the log-sum-exp that its parts are merged with.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch

from .outbox import Message, outbox_of

MOST_DIMENSIONS = 7
"""Of a tensor that PipeFusion sends."""


def has_accelerator() -> bool:
    return torch.accelerator.is_available()


def load_xfuser() -> ModuleType:
    """Import xfuser, for the CPU where there is no accelerator; raise `ImportError` without it.

    Importing it takes seconds; only runs on several devices need it.
    """
    if "xfuser" in sys.modules or has_accelerator():
        return import_module("xfuser")
    return import_for_cpu()


def import_for_cpu() -> ModuleType:
    """Import xfuser for gloo and CPU tensors; raise `RuntimeError` where an accelerator is."""
    if has_accelerator():
        raise RuntimeError(
            f"xfuser runs on the accelerator of this machine "
            f"({torch.accelerator.current_accelerator()}); import it as it is"
        )
    spec = find_spec("xfuser")
    if spec is None:
        raise ImportError("runs on several devices need xfuser: pip install 'xfuser>=0.7'")
    xfuser = sys.modules["xfuser"] = module_from_spec(spec)
    try:
        _answer_for_cpu(import_module("xfuser.envs"))
        with _triton_names():
            spec.loader.exec_module(xfuser)
    except BaseException:
        del sys.modules["xfuser"]
        raise
    _give_process_groups()
    _send_without_waiting()
    return xfuser


def _answer_for_cpu(envs: ModuleType) -> None:
    """Before the rest of xfuser is imported, since it asks while it is."""
    envs._is_cuda = envs._is_hip = lambda: False  # it asks how torch was built, not what is there
    envs.get_device_version = lambda: None
    envs.get_torch_distributed_backend = lambda: "gloo"
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True


@contextmanager
def _triton_names() -> Iterator[None]:
    """Stand in for triton, where it is missing, for as long as xfuser defines its kernels."""
    if find_spec("triton") is not None:
        yield
        return
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.jit = lambda kernel: kernel
    triton.language, language.constexpr = language, object
    names = {"triton": triton, "triton.language": language}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _give_process_groups() -> None:
    from yunchang.globals import PROCESS_GROUP

    for name, module in list(sys.modules.items()):
        if name.startswith("xfuser.") and "PROCESS_GROUP" in vars(module):
            module.PROCESS_GROUP = PROCESS_GROUP


def _send_without_waiting() -> None:
    """Give PipeFusion sends that suit gloo.

    xfuser lets go of the handles of its asynchronous sends, which gloo would then lose, and waits
    for the sends of shapes, which on a GPU does not block; two stages would wait for each other.
    """
    coordinator = import_module("xfuser.core.distributed.group_coordinator")
    coordinator.synchronize = lambda: None  # of a GPU
    stage = coordinator.PipelineGroupCoordinator
    send = stage._pipeline_isend

    def send_and_keep(self, tensor: torch.Tensor) -> Message:
        return outbox_of(self).keep(send(self, tensor), tensor)

    def communicate_shapes(self, tensor_send_to_next=None, recv_prev=False) -> torch.Size:
        if tensor_send_to_next is not None:
            size = tensor_send_to_next.shape
            message = torch.tensor([len(size), *size, *[0] * (MOST_DIMENSIONS - len(size))])
            work = torch.distributed.isend(message, self.next_rank, group=self.device_group)
            outbox_of(self).keep(work, message)
        if not recv_prev:
            return torch.Size([])
        message = torch.empty(1 + MOST_DIMENSIONS, dtype=torch.int64)
        torch.distributed.recv(message, self.prev_rank, group=self.device_group)
        count, *size = message.tolist()
        return torch.Size(size[:count])

    stage._pipeline_isend, stage._communicate_shapes = send_and_keep, communicate_shapes
