"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and the record of a drop or restore.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repr_det.method.layers import FilterLayer, zero_rows_
from repr_det.method.optimizers import zero_optimizer_state_


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
