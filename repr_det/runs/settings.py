"""Optimizer settings of a resumed run: those of its config, where the checkpoint's would win."""

from typing import Any

import torch
from detectron2.solver import LRMultiplier

_OF_THE_MACHINE = ("params", "lr", "foreach", "fused", "capturable", "differentiable")


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of every parameter group, as the config built it: the base rate is ``initial_lr``; ``lr`` follows from it."""
    return [
        {key: value for key, value in group.items() if key not in _OF_THE_MACHINE} for group in optimizer.param_groups
    ]


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: Any, built: list[dict[str, Any]]) -> list[str]:
    """Puts what ``settings_of`` told before a checkpoint was loaded over what the checkpoint brought, rates included.

    Returns:
        What changed, as "weight_decay 0.0001 -> 0.001", once for every pair of values.
    """
    changed: dict[str, None] = {}
    scale = [1.0] * len(built)
    for number, (group, own) in enumerate(zip(optimizer.param_groups, built, strict=True)):
        for key, value in own.items():
            old = group.get(key)
            if key not in group or old == value:
                continue
            changed[f"{key} {old} -> {value}"] = None
            group[key] = value
            if key == "initial_lr":
                scale[number] = value / old if old else 0.0
    if all(factor == 1 for factor in scale):
        return list(changed)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    exact = scheduler.get_lr() if isinstance(scheduler, LRMultiplier) else [None] * len(built)
    for group, factor, rate in zip(optimizer.param_groups, scale, exact, strict=True):
        group["lr"] = group["lr"] * factor if rate is None else rate
    return list(changed)
