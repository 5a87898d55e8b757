"""Agreement between the processes of a run, and transfers between devices."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gathered(value: Any, device: torch.device) -> list[Any]:
    """Picklable values of all ranks, in order; ``device`` is that of this process."""
    found = [value] * world_size()
    if len(found) > 1:
        with _made_current(device):
            dist.all_gather_object(found, value)
    return found


def of_rank_0(value: Any, device: torch.device) -> Any:
    """The picklable value of rank 0."""
    found = [value]
    if world_size() > 1:
        with _made_current(device):
            dist.broadcast_object_list(found, 0)
    return found[0]


def _made_current(device: torch.device) -> AbstractContextManager:
    # A backend that does not know the CPU sends objects by the current device.
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def mean_over_ranks(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """``device`` of this process: None takes the tensor's."""
    everyone = gathered(tensor.detach().cpu(), device or tensor.device)
    return torch.stack(everyone).mean(0).to(tensor.device)


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return to_devices(tensors, [torch.device("cpu")] * len(tensors))


def to_devices(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Moves tensors, with one transfer for all of a type, origin and target. Those at their target are not copied."""
    found = [tensor.detach() for tensor in tensors]
    kinds: dict[Any, list[int]] = {}
    for place, (tensor, device) in enumerate(zip(found, devices, strict=True)):
        if tensor.device != device:
            kinds.setdefault((tensor.device, device, tensor.dtype), []).append(place)
    for (_, device, _), places in kinds.items():
        whole = torch.cat([found[place].flatten() for place in places]).to(device)
        parts = whole.split([found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(found[place].shape)
    return found
