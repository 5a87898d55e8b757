"""Agreement between the processes of a run: no-ops in a single process, torch.distributed otherwise."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def broadcast_(tensors: list[Tensor]) -> None:
    """Overwrites ``tensors`` with those of rank 0; bool tensors too. Same shapes and order on every rank."""
    if world_size() == 1:
        return
    for tensor in tensors:
        moved = _collective_device(tensor)
        dist.broadcast(moved, 0)
        if moved is not tensor:
            tensor.copy_(moved.to(tensor.dtype))


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over the ranks, weighted equally."""
    if world_size() == 1:
        return tensor
    total = _collective_device(tensor).clone()
    dist.all_reduce(total)
    return (total / world_size()).to(tensor)


def check_agreement(tensors: dict[str, list[Tensor]], what: str) -> None:
    """Compares a hash of every named group of tensors over the ranks.

    Raises:
        RuntimeError: on every rank, naming the first group that differs and the ranks that differ from rank 0.
    """
    if world_size() == 1:
        return
    digests = {name: _digest(group) for name, group in tensors.items()}
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, digests)
    for name in digests:
        odd = [r for r, other in enumerate(gathered) if other.get(name) != gathered[0][name]]
        if odd:
            raise RuntimeError(f"{what}: layer {name} differs between rank 0 and rank(s) {odd}")


def _digest(group: list[Tensor]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for tensor in group:
        # Of 1x1 kernels in channels_last .contiguous() keeps strides that cannot be viewed as bytes.
        whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(whole.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _collective_device(tensor: Tensor) -> Tensor:
    """NCCL moves CUDA tensors only, and not every backend moves bool."""
    moved = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    if dist.get_backend() == "nccl" and not moved.is_cuda:
        moved = moved.cuda()
    return moved.contiguous()
