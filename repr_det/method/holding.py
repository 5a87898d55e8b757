"""Dropped filters, held at exactly zero (RePr, algorithm 1: the sub-network), and checks of transitions.

J: filters of a layer; M: those of it that are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

_EVERY = 100  # steps between looks at dropped filters, besides the powers of 2
_APART = 1e-3  # relative difference of a layer's norm between ranks: two kinds of cards differ less
_GONE = 0.1  # a returned filter below this share of its norm has been overwritten

_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType] = WeakKeyDictionary()  # conv -> its RePrScheme
_HELD: WeakSet[nn.Module] = WeakSet()  # convs with dropped filters


@dataclass
class Transition:
    """The record of a drop or a restore.

    Attributes:
        event: "drop" or "restore".
        cycle: from 0.
        dropped: layer name -> indices of the filters that left or came back.
        overlap_before, overlap_after: mean O_f of the filters in use.
        max_cosine: layer name -> largest |cos| of a new filter to the kept and old ones (restores only).
        overlaps: layer name -> O_f of every filter, before a drop or after a restore.
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
    """Notes whose convs these are. UserError if one has another scheme that is not closed, or filters that are out."""
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
    """Filters that are out; their gradient becomes 0 before DDP, clipping and the optimizer see it.

    Attributes:
        masks: layer name -> (J,) bool, True = dropped, on the CPU.
        rows: layer name -> indices of its dropped filters (M,), on the layer's device; ``kept`` of the others.
        layers: those that lose a filter.
    """

    def __init__(
        self, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
    ) -> None:
        self.masks = dict(masks)
        self.layers = [layer for layer in layers if masks[layer.name].any()]
        self.place()
        self._optimizers = optimizers
        self._handles: list[RemovableHandle] = []
        self._watching: list[RemovableHandle] = []
        self._leaks: dict[str, Tensor] = {}
        self._steps = 0

    def place(self) -> None:
        """Puts the indices where the layers are now: a model may move while filters are out."""
        names = [layer.name for layer in self.layers]
        masks = [self.masks[name] for name in names]
        parts = [mask.nonzero().flatten() for mask in (*masks, *(~mask for mask in masks))]
        moved = to_devices(parts, [layer.weight.device for layer in self.layers] * 2)
        self.rows = dict(zip(names, moved[: len(names)], strict=True))
        self.kept = dict(zip(names, moved[len(names) :], strict=True))

    def zero_(self) -> None:
        for layer in self.layers:
            zero_rows_(layer.tensors().values(), self.rows[layer.name])
            zero_optimizer_state_(self._optimizers, layer, self.rows[layer.name])

    def hold(self) -> None:
        """Lets no gradient through until ``release``, and watches the first pass."""
        for layer in self.layers:
            _HELD.add(layer.conv)
            rows = self.rows[layer.name]
            zero_rows_((p.grad for p in layer.parameters() if p.grad is not None), rows)
            self._handles += [_hook_gradient(parameter, rows) for parameter in layer.parameters()]
            for module in {layer.conv, layer.output_module()}:
                hook = HookOfOne(partial(self._note_output, layer.name))
                self._watching.append(module.register_forward_hook(hook))

    def _note_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.is_meta:
            found = output.detach().index_select(-3, self.rows[name].to(output.device)).any()
            before = self._leaks.get(name, found)
            self._leaks[name] = before | found.to(before.device)

    def check_step(self, cycle: int) -> None:
        """Raises UserError where channels or filters are not 0. ``cycle`` is from 1."""
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

    def not_zero(self) -> list[tuple[str, str]]:
        """Names of layers and of their tensors whose dropped filters are not 0."""
        flags = {}
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                rows = self.rows[layer.name].to(tensor.device)
                flags[layer.name, name] = tensor.detach().index_select(0, rows).any()
        return _true_ones(flags)

    def check_zero(self, when: str) -> None:
        """Raises UserError where a dropped filter is not 0."""
        if found := self.not_zero():
            layer, tensor = found[0]
            raise UserError(
                f"dropped filters of {layer} are not zero any more {when} (their {tensor}): another optimizer, loaded "
                "weights or a swapped-in average has written to them"
            )

    def release(self) -> None:
        self._stop_watching()
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            _HELD.discard(layer.conv)

    def _stop_watching(self) -> None:
        for handle in self._watching:
            handle.remove()


def _true_ones(flags: Mapping[Any, Tensor]) -> list[Any]:
    return [key for key, flag in zip(flags, to_cpu(list(flags.values())), strict=True) if flag]


def _hook_gradient(parameter: nn.Parameter, rows: Tensor) -> RemovableHandle:
    """Hooks a parameter even if it does not train now: it may later."""

    def zero(gradient: Tensor) -> Tensor | None:
        here = rows.to(gradient.device)
        # On the CPU a look is cheaper than a copy; behind a gamma of 0 gradients are 0 already.
        if gradient.device.type == "cpu" and not gradient.index_select(0, here).any():
            return None
        return gradient.index_fill(0, here, 0)

    trains = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(zero)
    parameter.requires_grad_(trains)
    return handle


def check_values(values: Values, when: str, device: torch.device) -> None:
    """Raises UserError where a value is not finite, RuntimeError where ranks differ. Collective."""
    for layer, tensors in values.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"the {name} of {layer} is not finite {when}: lower the learning rate or clip gradients, and "
                    "resume from an earlier checkpoint"
                )
    everyone = gathered({name: x["weight"].double().norm().item() for name, x in values.items()}, device)
    for name, size in everyone[0].items():
        odd = [number for number, theirs in enumerate(everyone) if abs(theirs[name] - size) > _APART * size]
        if odd:
            raise RuntimeError(f"RePr {when}: layer {name} differs between rank 0 and rank(s) {odd}")


class ReturnedFilters:
    """The filters (M, ...) that a restore has ``given``, looked at after one more step."""

    def __init__(self, held: HeldFilters, given: Mapping[str, Tensor]) -> None:
        self._layers = [layer for layer in held.layers if layer.name in given]
        self._rows = held.rows
        self._norms = {name: weight.float().flatten(1).norm(dim=1) for name, weight in given.items()}

    def check(self, cycle: int) -> None:
        """Raises UserError where they are gone."""
        weights = to_cpu([layer.weight.index_select(0, self._rows[layer.name]) for layer in self._layers])
        for layer, weight in zip(self._layers, weights, strict=True):
            gone = int((weight.float().flatten(1).norm(dim=1) < _GONE * self._norms[layer.name]).sum())
            if gone:
                raise UserError(
                    f"{gone} of {len(weight)} filters of {layer.name} are gone one step after they returned in cycle "
                    f"{cycle}: something, such as an optimizer with a copy of the weights, has written to them"
                )
