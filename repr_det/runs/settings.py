"""The optimizer of a resumed run: of the class that the checkpoint is from, with the settings of the config."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.solver import LRMultiplier

from repr_det.method.errors import UserError

_OF_THE_MACHINE = ("params", "lr", "foreach", "fused", "capturable", "differentiable")


def check_same_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], folder: str) -> None:
    """Raises UserError if the checkpoint is of an optimizer of another class or for other parameters.

    Args:
        saved: state dict of the optimizer in the checkpoint.
        folder: OUTPUT_DIR.
    """
    own, theirs = optimizer.param_groups, saved["param_groups"]
    numbers, their_numbers = ([len(group["params"]) for group in groups] for groups in (own, theirs))
    if numbers != their_numbers:
        raise UserError(
            f"the checkpoint in {folder} trains {sum(their_numbers)} parameters in {len(theirs)} groups, this run "
            f"{sum(numbers)} in {len(own)}: resume with the same MODEL, MODEL.BACKBONE.FREEZE_AT and SOLVER, or give "
            "another OUTPUT_DIR"
        )
    unknown = [key for group, saved in zip(own, theirs, strict=True) for key in saved if key not in group]
    if unknown := sorted(set(unknown) - set(_OF_THE_MACHINE)):
        raise UserError(
            f"the checkpoint in {folder} is of another optimizer: {type(optimizer).__name__} has no "
            f"{', '.join(unknown)}; resume with the optimizer of that run, or give another OUTPUT_DIR"
        )


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of every parameter group as the config built it; the base rate is ``initial_lr``, ``lr`` follows."""
    return [
        {key: value for key, value in group.items() if key not in _OF_THE_MACHINE} for group in optimizer.param_groups
    ]


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: Any, built: list[dict[str, Any]]) -> list[str]:
    """Puts what ``settings_of`` gave before a checkpoint was loaded over what the checkpoint brought, rates included.

    Returns:
        What changed, as "weight_decay 0.0001 -> 0.001", once for every pair of values.
    """
    changed: dict[str, None] = {}
    new_rates = False
    for group, own in zip(optimizer.param_groups, built, strict=True):
        for key, value in own.items():
            old = group.get(key, value)
            if old == value:
                continue
            changed[f"{key} {old} -> {value}"] = None
            group[key] = value
            if key == "initial_lr":
                new_rates = True
                group["lr"] *= value / old if old else 0.0
    if new_rates and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if new_rates and isinstance(scheduler, LRMultiplier):  # without the rounding of a division
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
    return list(changed)
