"""Agreement between the processes of a run, and the way from a device to the CPU: no-ops in a single process on it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gathered(value: Any, device: torch.device) -> list[Any]:
    """The picklable values of all ranks, in their order; ``device`` as in ``broadcast_``."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    # Where a backend does not know the CPU, objects go by way of the current device.
    accelerated = device.type != "cpu"
    with torch.get_device_module(device).device(device) if accelerated else nullcontext():
        dist.all_gather_object(found, value)
    return found


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, by one transfer for all of a type and device; those that are there are not copied."""
    return to_devices(tensors, [torch.device("cpu")] * len(tensors))


def to_devices(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Tensors, each on a device of its own, by one transfer for all of a type and way; those that are there are not
    copied."""
    found = [tensor.detach() for tensor in tensors]
    kinds: dict[Any, list[int]] = {}
    for place, (tensor, device) in enumerate(zip(tensors, devices, strict=True)):
        if tensor.device != device:
            kinds.setdefault((tensor.device, device, tensor.dtype), []).append(place)
    for (_, device, _), places in kinds.items():
        whole = torch.cat([tensors[place].detach().flatten() for place in places]).to(device)
        parts = whole.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def broadcast_(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Overwrites ``tensors`` with those of rank 0, by one collective call for all of a type.

    Args:
        tensors: of the same shapes and order on every rank, on any device.
        device: the own one of this process, for backends that do not know the CPU.
    """
    if world_size() == 1:
        return
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (_, dtype), group in kinds.items():
        whole = torch.cat([tensor.flatten() for tensor in group])
        # Not every backend moves bool.
        moved = _movable(whole.to(torch.uint8) if dtype == torch.bool else whole, device)
        dist.broadcast(moved, 0)
        parts = moved.to(whole).split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def mean_over_ranks(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The mean of ``tensor`` over the ranks; ``device`` as in ``broadcast_``, None where the tensor is on it."""
    if world_size() == 1:
        return tensor
    total = _movable(tensor, device or tensor.device).clone()
    dist.all_reduce(total)
    return (total / world_size()).to(tensor)


def _movable(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, contiguous and where the backends of the process group move it: NCCL and XCCL do so on the own device
    alone."""
    backends = dist.get_backend_config().split(",")  # such as cpu:gloo, cuda:nccl
    known = {backend.partition(":")[0] for backend in backends}
    if tensor.device.type == "cpu" and "cpu" in known:
        return tensor.contiguous()
    if device.type not in known:
        return tensor.cpu().contiguous()
    if tensor.device.type == "cpu" and tensor.dtype == torch.float64:
        tensor = tensor.float()  # which is on every device
    return tensor.to(device).contiguous()
