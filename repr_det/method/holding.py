"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and the record of a drop or restore.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method.layers import FilterLayer, zero_rows_


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
    """

    event: str
    cycle: int
    dropped: dict[str, list[int]]
    overlap_before: float
    overlap_after: float
    max_cosine: dict[str, float]
    seconds: float
    overlaps: dict[str, list[float]]


class HeldFilters:
    """The filters that are out of the network, from their drop to their return.

    The gradient of their rows is 0 as soon as it is computed (before DDP, clipping and the optimizer see it), so that
    no optimizer whose step is zero for a zero parameter, gradient and state moves what ``zero_`` has set to 0.

    Args:
        layers: all layers that take part.
        masks: layer name -> (J,) bool, True = dropped, on the layer's device.
        optimizer: holds the parameters of the layers.

    Attributes:
        masks: as given.
        rows: layer name -> (M,) indices of its dropped filters.
        layers: those of the layers that lose a filter.
    """

    def __init__(
        self, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.masks = {layer.name: masks[layer.name] for layer in layers}
        self.rows = {name: mask.nonzero().flatten() for name, mask in self.masks.items()}
        self.layers = [layer for layer in layers if len(self.rows[layer.name])]
        self._optimizer = optimizer
        self._handles = []
        for layer in self.layers:
            for parameter in layer.moving_parameters():
                rows = self.rows[layer.name]
                self._handles.append(parameter.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows, 0)))

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
            zero_optimizer_state_(self._optimizer, layer, self.rows[layer.name])

    def not_zero(self) -> str | None:
        """Name of a layer whose dropped filters are not exactly 0."""
        for layer in self.layers:
            if any(tensor[self.rows[layer.name]].count_nonzero() for tensor in layer.tensors().values()):
                return layer.name
        return None

    def release(self) -> None:
        """Lets gradients through again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Momentum and moments: what the optimizer keeps for every entry of ``parameter``, each of its shape."""
    state = optimizer.state.get(parameter, {})
    return [t for t in state.values() if torch.is_tensor(t) and t.shape == parameter.shape]


def zero_optimizer_state_(optimizer: torch.optim.Optimizer, layer: FilterLayer, rows: Tensor) -> None:
    """Sets momentum and moments of filters (M,) of a layer to 0."""
    for parameter in layer.parameters():
        zero_rows_(optimizer_state(optimizer, parameter), rows)
