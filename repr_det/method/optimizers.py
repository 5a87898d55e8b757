"""What RePr needs of optimizers: their state of single filters, those inside others, and a call for every step.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped or return
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, zero_rows_

# Optimizers by class name (or that of a base) whose state is not one entry for every entry of a parameter.
_OTHER_STATE = ("Adafactor", "LBFGS", "SM3", "Shampoo", "DistributedShampoo")
# How far an entry moves, by the names that optimizers give it in their state: averages of squared gradients, and the
# size of a step of Rprop.
_SCALES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "step_size")
# A second set of weights: of schedule-free optimizers, ASGD, Prodigy, several Lookaheads.
_WEIGHTS = ("z", "ax", "p0", "slow_param", "slow_params", "slow_buffer", "lookahead_slow_buff")


def with_inner(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """``optimizers``, and those that they hold and step themselves (SAM, Lookahead, ZeroRedundancyOptimizer)."""
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if not any(optimizer is one for one in found):
            found.append(optimizer)
            waiting += [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return found


def around_step(
    optimizer: Optimizer, before: Callable[[], Any] = lambda: None, after: Callable[[], Any] = lambda: None
) -> None:
    """Calls ``before`` and ``after`` around every step of ``optimizer``, once.

    torch runs the hooks of an instance in ``step`` of every class that has been used, so twice where that of a subclass
    calls that of its base.
    """

    def unless_inside(call: Callable[[], Any]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not _is_inside(optimizer, sys._getframe(1)):
                call()

        return hook

    optimizer.register_step_pre_hook(unless_inside(before))
    optimizer.register_step_post_hook(unless_inside(after))


def scale_rates(optimizer: Optimizer, share: Callable[[], float]) -> None:
    """Every step of ``optimizer`` takes its learning rates times ``share()``, which is asked before each.

    The rates are changed around the step alone: learning-rate schedules, logs and checkpoints do not see it.
    """
    rates: list[Any] = []

    def scale() -> None:
        factor = share()
        # A rate that is a tensor stays the same one: what has been compiled or captured reads it.
        rates[:] = [rate.clone() if torch.is_tensor(rate := group["lr"]) else rate for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= factor

    def put_back() -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if torch.is_tensor(rate):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    around_step(optimizer, scale, put_back)


def _is_inside(optimizer: Optimizer, step: FrameType) -> bool:
    """Whether torch's wrapper of a step has been called from that of another step of the same optimizer."""
    frame = step.f_back
    while frame is not None:
        if frame.f_code is step.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def check_optimizers(layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raises UserError where a trainable member of a filter is in none of the optimizers, or one of these keeps
    another state than momentum and moments entry by entry."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        for name, tensor in layer.tensors().items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in held:
                raise UserError(
                    f"REPR: the optimizer does not hold the {name} of {layer.name}, so that a dropped filter cannot be "
                    "held at zero: give RePrScheme all optimizers (a list), switch off its requires_grad where it does "
                    f"not train, or add {layer.name!r} to REPR.LAYERS.EXCLUDE"
                )
    for optimizer in optimizers:
        for name in (kind.__name__ for kind in type(optimizer).__mro__):
            if name in _OTHER_STATE:
                raise UserError(f"REPR cannot hold filters at zero under the optimizer {name}: {_STATE_WANTED}")


_STATE_WANTED = (
    "its state is not one number for every weight, from which a dropped filter can be taken out; "
    "choose SGD, Adam, AdamW or another that keeps momentum or moments only"
)


def check_optimizer_state(layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raises UserError where an optimizer keeps something for a layer whose rows are not those of its filters."""
    for optimizer in optimizers:
        for layer in layers:
            for parameter in layer.parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if not _by_entries(value, parameter):
                        raise UserError(
                            f"REPR cannot hold filters of {layer.name} at zero under the optimizer "
                            f"{type(optimizer).__name__} (its {key!r}): {_STATE_WANTED}"
                        )


def _by_entries(value: object, parameter: Tensor) -> bool:
    """Whether a piece of optimizer state is a number (a step count) or has an entry for each of the parameter's."""
    if isinstance(value, list | tuple):
        return all(_by_entries(part, parameter) for part in value)
    if not torch.is_tensor(value) or value.dim() == 0 or value.shape == (1,) != parameter.shape:
        return True
    return value.shape == parameter.shape and (value.is_floating_point() or value.dtype == torch.bool)


def optimizer_state(optimizers: Sequence[Optimizer], parameter: Tensor) -> dict[str, list[Tensor]]:
    """Momentum and moments by name: what optimizers keep for every entry of ``parameter``, each of its shape."""
    found: dict[str, list[Tensor]] = {}
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                found.setdefault(key, []).append(value)
    return found


def zero_optimizer_state_(optimizers: Sequence[Optimizer], layer: FilterLayer, rows: Tensor) -> None:
    """Sets momentum and moments of filters (M,) of a layer to 0."""
    for parameter in layer.parameters():
        for tensors in optimizer_state(optimizers, parameter).values():
            zero_rows_(tensors, rows)


def restart_optimizer_state_(
    optimizers: Sequence[Optimizer], parameter: Tensor, mask: Tensor, rows: slice = slice(None), dim: int = 0
) -> None:
    """Optimizer state for entries of a parameter that begin to train anew: momentum 0, squared gradients as those of
    the others, a second set of weights as the first.

    An optimizer counts its steps for a whole parameter. Squared gradients of 0 after many steps would stand for a
    filter whose gradients have all been tiny, and Adam's first steps would be several times the learning rate.

    Args:
        mask: bool, of the length of ``parameter[rows]`` along ``dim``, True where entries begin anew.
        rows: the filters that this is about.
        dim: 0 where the mask is of filters, 1 where it is of input channels.
    """
    anew, others = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    for key, tensors in optimizer_state(optimizers, parameter).items():
        for tensor in (whole[rows] for whole in tensors):
            if key in _WEIGHTS:
                tensor.index_copy_(dim, anew, parameter[rows].index_select(dim, anew).to(tensor.dtype))
                continue
            value = _mean_scale(key, tensor, others, dim)
            tensor.index_fill_(dim, anew, 0 if value is None else value)


def raise_squares_of_inputs_(optimizers: Sequence[Optimizer], weight: Tensor, mask: Tensor) -> None:
    """The same for a conv's kernels on input channels that were zero and return: while their gradients were 0 their
    squares have decayed. Momentum and squares that are larger stay."""
    anew, others = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    for key, tensors in optimizer_state(optimizers, weight).items():
        for tensor in tensors:
            value = _mean_scale(key, tensor, others, 1)
            if value is not None:
                tensor[:, anew] = tensor[:, anew].clamp_min(value)


def _mean_scale(key: str, tensor: Tensor, others: Tensor, dim: int) -> float | None:
    """One number for all entries: kernels on a channel that was zero have no squares to compare with."""
    if key not in _SCALES or not len(others):
        return None
    return tensor.index_select(dim, others).float().mean().item()
