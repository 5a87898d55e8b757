"""Norms of channels, known by what they hold and do, not by their names."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, FROZEN, GROUP, NONE = "batch", "frozen", "group", "none"
SILENT = 1e-7  # a gamma that float32 rounds away, and a ReLU not: it has no gradient at 0, and float16 knows no less


def norm_kind(norm: nn.Module | None) -> str:
    """ "batch" (BN, SyncBN, naiveSyncBN, IN), "frozen" (statistics that training does not move), "group" or "none"."""
    if norm is None or isinstance(norm, nn.Identity):
        return NONE
    if isinstance(norm, nn.GroupNorm):
        return GROUP
    trains = isinstance(norm, nn.modules.batchnorm._BatchNorm) or isinstance(norm.weight, nn.Parameter)
    return BATCH if trains else FROZEN


def is_norm(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return True
    held = [getattr(module, key, None) for key in ("weight", "running_mean", "running_var")]
    bias = getattr(module, "bias", None)
    if bias is not None:
        held.append(bias)
    return all(isinstance(x, Tensor) and x.dim() == 1 and len(x) == len(held[0]) for x in held)


def epsilon(norm: nn.Module) -> float:
    """The number that a norm adds to the variance; without an ``eps``, by its output for ones at a variance of 0."""
    known = getattr(norm, "eps", None)
    if isinstance(known, float):
        return known
    probe = copy.deepcopy(norm).cpu().double().eval()
    with torch.no_grad():
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 0)):
            if getattr(probe, name, None) is not None:
                getattr(probe, name).fill_(value)
        gain = probe(torch.ones(1, len(probe.weight), 1, 1, dtype=torch.float64, device="cpu")).flatten()[0].item()
    return 1 / gain**2


def restart_averaging(modules: Iterable[Any]) -> None:
    """Restarts BN that averages its statistics over all batches (momentum None)."""
    for module in modules:
        averages = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None
        if averages and module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()
