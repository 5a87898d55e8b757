"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and the record of a drop or restore.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, zero_rows_

# Optimizers by class name (or that of a base) whose state is not one entry for every entry of a parameter.
_OTHER_STATE = ("Adafactor", "LBFGS", "SM3", "Shampoo", "DistributedShampoo")
# Averages of squared gradients, by the names that optimizers give them in their state.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum")


@dataclass
class Transition:
    """What a drop or a restore did.

    Attributes:
        event: "drop" or "restore".
        cycle: index of the cycle, from 0.
        dropped: layer name -> indices of the filters that left or came back.
        overlap_before, overlap_after: mean O_f over the filters in use before and after.
        max_cosine: layer name -> largest |cos| of a new filter to the kept and old ones (restores only).
        seconds: wall-clock time.
        overlaps: layer -> O_f of every filter, before a drop and after a restore.
        slim: at the restore of the sub-network that found out which way costs less: the fields of
            ``slim_choice.Choice``; else None.
    """

    event: str
    cycle: int
    dropped: dict[str, list[int]]
    overlap_before: float
    overlap_after: float
    max_cosine: dict[str, float]
    seconds: float
    overlaps: dict[str, list[float]]
    slim: dict[str, Any] | None = None


class HeldFilters:
    """The filters that are out of the network, from their drop to their return.

    While they are held the gradient of their rows is 0: what was accumulated until then is cleared, and what comes is 0
    as soon as it is computed (before DDP, clipping and the optimizer see it), so that no optimizer whose step is zero
    for a zero parameter, gradient and state moves what ``zero_`` has set to 0.

    Args:
        layers: all layers that take part.
        masks: layer name -> (J,) bool, True = dropped, on the layer's device.
        optimizers: hold the parameters of the layers.
        norm_is_known: layer name -> whether its norm is sure to be the one behind its conv. Where it is not, gradients
            of the conv are left alone: that they move what should be zero shows the mistake at the restore.

    Attributes:
        masks: as given.
        rows: layer name -> (M,) indices of its dropped filters.
        layers: those of the layers that lose a filter.
    """

    def __init__(
        self,
        layers: Sequence[FilterLayer],
        masks: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        norm_is_known: Callable[[str], bool],
    ) -> None:
        self.masks = {layer.name: masks[layer.name] for layer in layers}
        self.rows = {name: mask.nonzero().flatten() for name, mask in self.masks.items()}
        self.layers = [layer for layer in layers if len(self.rows[layer.name])]
        self._optimizers = optimizers
        self._norm_is_known = norm_is_known
        self._handles: list[RemovableHandle] = []

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def __contains__(self, layer: FilterLayer) -> bool:
        return layer in self.layers

    def indices(self) -> dict[str, list[int]]:
        """Layer name -> indices of its dropped filters; layers that keep all of theirs are missing."""
        return {layer.name: self.rows[layer.name].tolist() for layer in self.layers}

    def zero_(self) -> None:
        """Sets every tensor of the dropped filters to exactly 0, and their optimizer state."""
        for layer in self.layers:
            zero_rows_(layer.tensors().values(), self.rows[layer.name])
            zero_optimizer_state_(self._optimizers, layer, self.rows[layer.name])

    def hold(self) -> None:
        """Lets no gradient through until ``release``."""
        for layer in self.layers:
            rows = self.rows[layer.name]
            zero_rows_((p.grad for p in layer.parameters() if p.grad is not None), rows)
            moving = layer.moving_parameters()
            for parameter in layer.parameters():
                if any(parameter is one for one in moving):
                    self._handles.append(parameter.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows, 0)))
                elif parameter.requires_grad:
                    self._handles.append(self._look_once(layer.name, parameter, rows))

    def _look_once(self, name: str, parameter: nn.Parameter, rows: Tensor) -> RemovableHandle:
        """For a parameter whose gradient is zero by itself (``moving_parameters``), as long as nothing but the norm
        reads the conv and one call of it: the first gradient tells, and where it is not it is made so from then on."""
        looked = False

        def zero(grad: Tensor) -> Tensor | None:
            nonlocal looked
            if not looked:
                looked = True
                if not (self._norm_is_known(name) and grad.index_select(0, rows).count_nonzero()):
                    handle.remove()
                    return None
            return grad.index_fill(0, rows, 0)

        handle = parameter.register_hook(zero)
        return handle

    def not_zero(self) -> tuple[str, str] | None:
        """Names of a layer and of its tensor whose dropped filters are not exactly 0."""
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                if tensor[self.rows[layer.name]].count_nonzero():
                    return layer.name, name
        return None

    def release(self) -> None:
        """Lets gradients through again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


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
    the others.

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
            value = _mean_square(key, tensor, others, dim)
            tensor.index_fill_(dim, anew, 0 if value is None else value)


def raise_squares_of_inputs_(optimizers: Sequence[Optimizer], weight: Tensor, mask: Tensor) -> None:
    """The same for a conv's kernels on input channels that were zero and return: while their gradients were 0 their
    squares have decayed. Momentum and squares that are larger stay."""
    anew, others = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    for key, tensors in optimizer_state(optimizers, weight).items():
        for tensor in tensors:
            value = _mean_square(key, tensor, others, 1)
            if value is not None:
                tensor[:, anew] = tensor[:, anew].clamp_min(value)


def _mean_square(key: str, tensor: Tensor, others: Tensor, dim: int) -> float | None:
    """One number for all entries: kernels on a channel that was zero have no squares to compare with."""
    if key not in _SQUARES or not len(others):
        return None
    return tensor.index_select(dim, others).float().mean().item()
