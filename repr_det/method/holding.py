"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and the record of a drop or restore.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repr_det.method.distributed import to_devices
from repr_det.method.layers import FilterLayer, zero_rows_
from repr_det.method.optimizers import zero_optimizer_state_
from repr_det.network.tracing import HookOfOne


@dataclass
class Transition:
    """The record of a drop or a restore.

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


def transition_of(
    event: str,
    cycle: int,
    held: "HeldFilters",
    overlaps: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    start: float,
    cosines: Mapping[str, float] | None = None,
) -> Transition:
    """``overlaps`` and ``kept`` are O_f of all filters (J,) by layer name, and of those that stay (K,); ``start`` is by
    ``time.perf_counter``."""
    means = [torch.cat([x.double() for x in found.values()]).mean().item() for found in (overlaps, kept)]
    before, after = means if event == "drop" else reversed(means)
    rounded = {name: [round(value, 6) for value in overlap.tolist()] for name, overlap in overlaps.items()}
    return Transition(
        event, cycle, held.indices(), before, after, dict(cosines or {}), time.perf_counter() - start, rounded
    )


class HeldFilters:
    """The filters that are out of the network, from their drop to their return.

    The gradient of their rows becomes 0 as soon as it is computed, before DDP, clipping and the optimizer see it.

    Attributes:
        masks: layer name -> (J,) bool, True = dropped, on the CPU.
        rows: layer name -> (M,) indices of its dropped filters, on the layer's device.
        kept: layer name -> (K,) indices of the others, on the layer's device.
        layers: those of the layers that lose a filter.
    """

    def __init__(
        self, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
    ) -> None:
        self.masks = {layer.name: masks[layer.name] for layer in layers}
        self.layers = [layer for layer in layers if self.masks[layer.name].any()]
        dropped = [_indices(self.masks[layer.name]) for layer in self.layers]
        kept = [_indices(~self.masks[layer.name]) for layer in self.layers]
        moved = to_devices([*dropped, *kept], [layer.weight.device for layer in self.layers] * 2)
        names = [layer.name for layer in self.layers]
        self.rows = dict(zip(names, moved, strict=False))
        self.kept = dict(zip(names, moved[len(names) :], strict=True))
        self._optimizers = optimizers
        self._handles: list[RemovableHandle] = []
        self._watching: list[RemovableHandle] = []
        self._leaks: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def indices(self) -> dict[str, list[int]]:
        """Layer name -> indices of its dropped filters; layers that keep all of theirs are missing."""
        return {layer.name: _indices(self.masks[layer.name]).tolist() for layer in self.layers}

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
            for parameter in layer.parameters():
                self._handles.append(_hook_gradient(parameter, rows))

    def watch_channels(self) -> None:
        """Looks at what conv and norm put out for the dropped channels, until ``leaking`` is asked."""
        for layer in self.layers:
            for module in {layer.conv, layer.output_module()}:
                self._watching.append(module.register_forward_hook(HookOfOne(self._channel_hook(layer.name))))

    def _channel_hook(self, name: str) -> Any:
        rows = self.rows[name]

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.is_meta:
                found = output.detach().index_select(-3, rows.to(output.device)).any()
                before = self._leaks.get(name)
                self._leaks[name] = found if before is None else before | found.to(before.device)

        return look

    def saw_channels(self) -> bool:
        """Tells whether a training pass has run since ``watch_channels``."""
        return bool(self._leaks)

    def leaking(self) -> list[str]:
        """Names of the layers whose dropped channels were seen not to be 0. One wait for the device."""
        leaks, self._leaks = self._leaks, {}
        self._stop_watching()
        flags = torch.stack([flag.to(self.layers[0].weight.device) for flag in leaks.values()]).tolist()
        return [name for name, flag in zip(leaks, flags, strict=True) if flag]

    def _stop_watching(self) -> None:
        for handle in self._watching:
            handle.remove()
        self._watching = []

    def not_zero(self) -> tuple[str, str] | None:
        """Names of a layer and of its tensor whose dropped filters are not 0. One wait for the device."""
        names, flags = [], []
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                names.append((layer.name, name))
                rows = self.rows[layer.name].to(tensor.device)
                flags.append(tensor.detach().index_select(0, rows).any())
        device = self.layers[0].weight.device if self.layers else None
        found = torch.stack([flag.to(device) for flag in flags]).tolist() if flags else []
        return next((name for name, flag in zip(names, found, strict=True) if flag), None)

    def release(self) -> None:
        """Lets gradients through again."""
        self._stop_watching()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _hook_gradient(parameter: nn.Parameter, rows: Tensor) -> RemovableHandle:
    """Also where the parameter does not train now: it may be made to while its filters are out."""

    def zero(gradient: Tensor) -> Tensor | None:
        here = rows.to(gradient.device)
        # On the CPU a look is cheaper than a copy; behind a norm whose gamma is 0 these gradients are 0 by themselves.
        if gradient.device.type == "cpu" and not gradient.index_select(0, here).any():
            return None
        return gradient.index_fill(0, here, 0)

    trains = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(zero)
    parameter.requires_grad_(trains)
    return handle
