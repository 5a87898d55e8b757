"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and checks of transitions.

Shape shorthand:
    J: filters of a layer        M: filters of it that are dropped
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from repr_det.method.distributed import gathered, to_cpu, to_devices
from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, Values, zero_rows_
from repr_det.method.optimizers import zero_optimizer_state_
from repr_det.network.tracing import HookOfOne

_EVERY = 100  # steps of the sub-network after which dropped filters are looked at, besides the powers of 2
_APART = 1e-3  # relative difference of a layer's norm between ranks, of more than two kinds of cards round
_GONE = 0.1  # a filter of less than this share of the norm that it was given has not been given it

_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType] = WeakKeyDictionary()  # conv -> its RePrScheme
_HELD: WeakSet[nn.Module] = WeakSet()  # convs with dropped filters


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
        overlaps: layer name -> O_f of every filter, before a drop and after a restore.
    """

    event: str
    cycle: int
    dropped: dict[str, list[int]]
    overlap_before: float
    overlap_after: float
    max_cosine: dict[str, float]
    seconds: float
    overlaps: dict[str, list[float]]


def claim(scheme: Any, layers: Sequence[FilterLayer]) -> None:
    """Notes the RePrScheme of convs. UserError if one has another that is not closed, or filters that are out."""
    for layer in layers:
        if layer.conv in _HELD:
            raise UserError(
                f"another RePr holds filters of {layer.name} at zero: finish() and close() it, or build the model again"
            )
        owner = _OWNERS[layer.conv]() if layer.conv in _OWNERS else None
        if owner is not None and not owner.is_closed:
            raise UserError(f"{layer.name} belongs to another RePr already: close() that one first")
    for layer in layers:
        _OWNERS[layer.conv] = ref(scheme)


class HeldFilters:
    """The filters that are out of the network, from their drop to their return.

    The gradient of their rows becomes 0 as soon as it is computed, before DDP, clipping and the optimizer see it.

    Attributes:
        masks: layer name -> (J,) bool, True = dropped, on the CPU.
        rows: layer name -> (M,) indices of its dropped filters, on the layer's device.
        kept: layer name -> indices of the others, on the layer's device.
        layers: those of the layers that lose a filter.
    """

    def __init__(
        self, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
    ) -> None:
        self.masks = dict(masks)
        self.layers = [layer for layer in layers if masks[layer.name].any()]
        names = [layer.name for layer in self.layers]
        parts = [_indices(masks[name]) for name in names] + [_indices(~masks[name]) for name in names]
        moved = to_devices(parts, [layer.weight.device for layer in self.layers] * 2)
        self.rows = dict(zip(names, moved[: len(names)], strict=True))
        self.kept = dict(zip(names, moved[len(names) :], strict=True))
        self._optimizers = optimizers
        self._handles: list[RemovableHandle] = []
        self._watching: list[RemovableHandle] = []
        self._leaks: dict[str, Tensor] = {}
        self._steps = 0

    def zero_(self) -> None:
        """Sets every tensor of the dropped filters to exactly 0, and their optimizer state."""
        for layer in self.layers:
            zero_rows_(layer.tensors().values(), self.rows[layer.name])
            zero_optimizer_state_(self._optimizers, layer, self.rows[layer.name])

    def hold(self) -> None:
        """Lets no gradient through until ``release``, and watches the first pass of the sub-network."""
        for layer in self.layers:
            _HELD.add(layer.conv)
            rows = self.rows[layer.name]
            zero_rows_((p.grad for p in layer.parameters() if p.grad is not None), rows)
            self._handles += [_hook_gradient(parameter, rows) for parameter in layer.parameters()]
            for module in {layer.conv, layer.output_module()}:
                self._watching.append(module.register_forward_hook(HookOfOne(self._channel_hook(layer.name))))

    def _channel_hook(self, name: str) -> Callable[..., None]:
        rows = self.rows[name]

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.is_meta:
                found = output.detach().index_select(-3, rows.to(output.device)).any()
                before = self._leaks.get(name, found)
                self._leaks[name] = before | found.to(before.device)

        return look

    def look(self, cycle: int) -> None:
        """Raises UserError where channels are not 0 in the first pass, or filters after a step. ``cycle`` is from 1."""
        if self._leaks:
            self._stop_watching()
            leaking, self._leaks = _true_ones(self._leaks), {}
            if leaking:
                raise UserError(
                    f"dropped channels of {', '.join(leaking)} are not 0 in the sub-network's first pass: something is "
                    "added behind the conv or its norm; exclude these convs"
                )
        self._steps += 1
        if self._steps % _EVERY == 0 or self._steps.bit_count() == 1:
            self.check_zero(f"{self._steps} steps after the drop of cycle {cycle}")

    def check_zero(self, when: str) -> None:
        """Raises UserError where a dropped filter is not 0. One wait for the device."""
        flags = {}
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                rows = self.rows[layer.name].to(tensor.device)
                flags[layer.name, name] = tensor.detach().index_select(0, rows).any()
        if found := _true_ones(flags):
            raise UserError(
                f"dropped filters of {found[0][0]} are not zero any more {when} (their {found[0][1]}): another "
                "optimizer, loaded weights or an average that was swapped in has written to them"
            )

    def release(self) -> None:
        """Lets gradients through again."""
        self._stop_watching()
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            _HELD.discard(layer.conv)

    def _stop_watching(self) -> None:
        for handle in self._watching:
            handle.remove()


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _true_ones(flags: Mapping[Any, Tensor]) -> list[Any]:
    return [key for key, flag in zip(flags, to_cpu(list(flags.values())), strict=True) if flag]


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


def check_values(values: Values, when: str, device: torch.device) -> None:
    """Raises UserError where a value of a filter is not finite, RuntimeError where ranks differ. Collective."""
    for layer, tensors in values.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"the {name} of {layer} is not finite {when}: lower the learning rate or clip gradients, and "
                    "resume from a checkpoint before training diverged"
                )
    everyone = gathered({name: x["weight"].double().norm().item() for name, x in values.items()}, device)
    for name, size in everyone[0].items():
        odd = [number for number, theirs in enumerate(everyone) if abs(theirs[name] - size) > _APART * size]
        if odd:
            raise RuntimeError(f"RePr {when}: layer {name} differs between rank 0 and rank(s) {odd}")


class ReturnedFilters:
    """The filters (M, ...) that a restore has ``given``, to be looked at after one more step; ``cycle`` is from 1."""

    def __init__(self, held: HeldFilters, given: Mapping[str, Tensor]) -> None:
        self._layers = [layer for layer in held.layers if layer.name in given]
        self._rows = held.rows
        self._norms = {name: weight.float().flatten(1).norm(dim=1) for name, weight in given.items()}

    def look(self, cycle: int) -> None:
        """Raises UserError where they are gone."""
        weights = to_cpu([layer.weight.index_select(0, self._rows[layer.name]) for layer in self._layers])
        for layer, weight in zip(self._layers, weights, strict=True):
            gone = int((weight.float().flatten(1).norm(dim=1) < _GONE * self._norms[layer.name]).sum())
            if gone:
                raise UserError(
                    f"{gone} of {len(weight)} filters of {layer.name} are gone one step after they returned in cycle "
                    f"{cycle}: something has written to them, such as a copy of the weights that an optimizer keeps"
                )
