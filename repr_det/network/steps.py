"""Optimizers seen from outside."""

import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def with_inner(optimizer: Any) -> list[Optimizer]:
    """An optimizer or a list of them, and those that they hold (SAM, Lookahead, accelerate's wrapper)."""
    found: list[Any] = []
    waiting = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    while waiting:
        holder = waiting.pop(0)
        if holder not in found:
            found.append(holder)
            waiting += [value for value in vars(holder).values() if isinstance(value, Optimizer)]
    return [one for one in found if isinstance(one, Optimizer) and "state" in vars(one)]


def around_step(
    optimizers: Sequence[Optimizer], before: Callable[[], Any] = lambda: None, after: Callable[[], Any] = lambda: None
) -> list[Any]:
    """Calls ``before`` and ``after`` around every step, once for optimizers that step each other.

    torch runs hooks twice if ``step`` of a subclass calls that of its base. Returns handles with ``remove``.
    """

    def unless_inside(call: Callable[[], Any]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not _is_inside(optimizers, sys._getframe(1)):
                call()

        return torch.compiler.disable(hook)

    handles = []
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(unless_inside(before)))
        handles.append(optimizer.register_step_post_hook(unless_inside(after)))
    return handles


def _is_inside(optimizers: Sequence[Optimizer], frame: FrameType) -> bool:
    """Tells whether the step that ``frame`` runs in was called from another step."""

    def is_step(frame: FrameType) -> bool:
        return any(frame.f_locals.get("self") is optimizer for optimizer in optimizers)

    frames = (outer for outer, _ in traceback.walk_stack(frame))
    step = next(filter(is_step, frames), None)
    return any(outer.f_code is step.f_code and is_step(outer) for outer in frames)


def scale_rates(optimizers: Sequence[Optimizer], share: Callable[[], float]) -> list[Any]:
    """Scales the learning rates by ``share()`` during every step; returns handles with ``remove``."""
    own: list[dict[str, Any]] = []
    rates: list[Any] = []

    def scale() -> None:
        factor = share()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # others after load_state_dict
        own[:] = {id(group): group for group in groups}.values()  # SAM's are those of its inner optimizer
        rates[:] = [rate.clone() if torch.is_tensor(rate := group["lr"]) else rate for group in own]
        # A tensor stays the same, which a compiled step reads; several groups may have one together.
        for tensor in {group["lr"] for group in own if torch.is_tensor(group["lr"])}:
            tensor.mul_(factor)
        for group in own:
            if not torch.is_tensor(group["lr"]):
                group["lr"] *= factor

    def put_back() -> None:
        for group, rate in zip(own, rates, strict=True):
            if torch.is_tensor(rate):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    return around_step(optimizers, scale, put_back)


def learning_rates(optimizers: Sequence[Optimizer]) -> dict[Tensor, float]:
    """The largest learning rate of every parameter that an optimizer holds."""
    found: dict[Tensor, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = float(group.get("lr", 1))
            for parameter in group["params"]:
                found[parameter] = max(rate, found.get(parameter, 0.0))
    return found
