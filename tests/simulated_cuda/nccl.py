"""NCCL, XCCL and their like by way of gloo: what they refuse is refused."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simulated_cuda.device import on_cpu

_backend = ""


def install() -> None:
    """For this process; a process group of any backend is then one of gloo."""
    start = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        global _backend
        _backend = backend
        start("gloo", **options)

    dist.init_process_group = init_process_group
    dist.get_backend_config = lambda group=None: str(dist.distributed_c10d.BackendConfig(dist.Backend(_backend)))
    dist.all_reduce = _on_tensor(dist.all_reduce)
    dist.broadcast_object_list = _on_object(dist.broadcast_object_list)
    dist.all_gather_object = _on_object(dist.all_gather_object)


def _own() -> torch.device:
    return torch.device("cuda", dist.get_rank())


def _knows_cpu() -> bool:
    return "cpu:" in dist.get_backend_config()


def _on_tensor(call: Any) -> Any:
    def move(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        if not tensor.is_cuda and not _knows_cpu():
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        if tensor.is_cuda and tensor.device != _own():
            raise RuntimeError(f"rank {dist.get_rank()} moves a tensor of {tensor.device}, which another rank may use")
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
        if tensor.is_cuda and tensor.dtype == torch.float64:
            raise TypeError("float64 is not on every device")
        call(on_cpu(tensor) if tensor.is_cuda else tensor, *args, **kwargs)

    return move


def _on_object(call: Any) -> Any:
    def move(found: list, value: Any, group: Any = None) -> None:
        if not _knows_cpu() and torch.cuda.current_device() != _own().index:
            raise RuntimeError("objects go by way of the current device, which is another rank's")
        call(found, value, group)

    return move
