"""Optimizers seen from outside."""

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
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
            waiting += [value for value in getattr(holder, "__dict__", {}).values() if isinstance(value, Optimizer)]
    return [one for one in found if isinstance(one, Optimizer) and "state" in vars(one)]


def around_step(
    optimizers: Sequence[Optimizer],
    before: Callable[[tuple, dict[str, Any]], Any] | None = None,
    after: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Calls ``before`` and ``after`` around every step, once for optimizers that step each other.

    torch runs hooks twice if ``step`` of a subclass calls that of its base. Returns handles with ``remove``.

    Args:
        before: gets the arguments of ``step``, and may return others. With it ``after`` runs in front of other hooks.
    """

    @torch.compiler.disable
    def begin(_: Optimizer, arguments: tuple, keywords: dict[str, Any]) -> Any:
        return None if before is None or _is_inside(optimizers, sys._getframe(1)) else before(arguments, keywords)

    @torch.compiler.disable
    def end(*_: Any) -> None:
        if not _is_inside(optimizers, sys._getframe(1)):
            after()

    handles = []
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(begin))
        handles.append(optimizer.register_step_post_hook(end))
        if before is not None:
            optimizer._optimizer_step_post_hooks.move_to_end(handles[-1].id, last=False)
    return handles


def _is_inside(optimizers: Sequence[Optimizer], frame: FrameType) -> bool:
    """Tells whether the step that ``frame`` runs in was called from another step."""

    def is_step(frame: FrameType) -> bool:
        return any(frame.f_locals.get("self") is optimizer for optimizer in optimizers)

    frames = (outer for outer, _ in traceback.walk_stack(frame))
    step = next(filter(is_step, frames), None)
    return any(outer.f_code is step.f_code and is_step(outer) for outer in frames)


@dataclass
class _Scaled:
    """A learning rate during a step.

    Attributes:
        group: its param group.
        own: the rate without the shares.
        shares: what each of those that scale it multiplies it with.
    """

    group: dict[str, Any]
    own: Any
    shares: dict[object, float] = field(default_factory=dict)

    @property
    def rate(self) -> Any:
        return self.own * math.prod(self.shares.values())

    def take_over(self) -> None:
        """Follows a rate that the step has computed from ``rate``; of a tensor without a wait for its device."""
        now, share = self.group["lr"], math.prod(self.shares.values())
        if torch.is_tensor(now):
            self.own = torch.where(now == self.rate, self.own, now / share)
        elif now != self.rate:
            self.own = now / share

    def write(self) -> None:
        """Sets the rate. A tensor stays the same one, which a compiled step reads."""
        if torch.is_tensor(self.group["lr"]):
            self.group["lr"].copy_(self.rate)
        else:
            self.group["lr"] = self.rate


_SCALED: dict[int, _Scaled] = {}  # by the id of a group, or of a tensor, which several groups may have together


def scale_rates(optimizers: Sequence[Optimizer], share: Callable[[], float]) -> list[Any]:
    """Scales the learning rates by ``share()`` during every step; returns handles with ``remove``.

    Several may scale the rates of an optimizer. A step that fails leaves no rate scaled: its closure puts it back, and
    otherwise the next step does.
    """
    me = object()

    def scale(arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        factor = share()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # others after load_state_dict
        for group in groups:
            rate = group["lr"]
            scaled = _SCALED.setdefault(id(rate if torch.is_tensor(rate) else group), _Scaled(group, deepcopy(rate)))
            if scaled.shares and scaled.rate != rate:  # set since a step that failed
                scaled.own, scaled.shares = deepcopy(rate), {}
            scaled.shares[me] = factor
            scaled.write()
        return tuple(map(guarded, arguments)), {name: guarded(value) for name, value in keywords.items()}

    def guarded(value: Any) -> Any:
        """A closure, such that the rates are put back where it fails; anything else as it is."""
        if not callable(value) or isinstance(value, Optimizer):
            return value

        def closure(*arguments: Any) -> Any:
            try:
                return value(*arguments)
            except BaseException:
                put_back()
                raise

        return closure

    def put_back() -> None:
        for place, scaled in list(_SCALED.items()):
            if me in scaled.shares:
                scaled.take_over()
                del scaled.shares[me]
                scaled.write()
            if not scaled.shares:
                del _SCALED[place]

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
