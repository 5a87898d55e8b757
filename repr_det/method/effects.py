"""Looks at the effects of drops, restores and the steps after them, which are errors where they are not as promised."""

from collections.abc import Mapping

import torch
from torch import Tensor

from repr_det.method.distributed import gathered, to_cpu, world_size
from repr_det.method.errors import UserError
from repr_det.method.holding import HeldFilters

_EVERY = 100  # steps of the sub-network after which dropped filters are looked at; the first ones more often
_APART = 1e-3  # relative difference of a layer's norm between ranks
_GONE = 0.1  # a filter of less than this share of the norm that it was given has not been given it


def check_finite(values: Mapping[str, Mapping[str, Tensor]], when: str) -> None:
    """Raises UserError where a value of a filter is not finite."""
    for layer, tensors in values.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"the {name} of {layer} is not finite {when}: training has diverged; lower the learning rate or "
                    "clip gradients, and resume from a checkpoint before that"
                )


def check_zero(held: HeldFilters, when: str) -> None:
    """Raises UserError where a dropped filter is not 0."""
    if (found := held.not_zero()) is not None:
        raise UserError(
            f"dropped filters of {found[0]} are not zero any more {when} (their {found[1]}). Something besides the "
            "optimizers that RePr knows has written to them: another optimizer, weights loaded into the model, or an "
            "average swapped in and not out again"
        )


def check_agreement(values: Mapping[str, Mapping[str, Tensor]], when: str, device: torch.device) -> None:
    """Raises RuntimeError where filters differ between ranks by more than two kinds of cards round. Collective."""
    if world_size() == 1:
        return
    sizes = {name: tensors["weight"].double().norm().item() for name, tensors in values.items()}
    everyone = gathered(sizes, device)
    for name, size in everyone[0].items():
        odd = [number for number, theirs in enumerate(everyone) if abs(theirs[name] - size) > _APART * size]
        if odd:
            raise RuntimeError(f"RePr {when}: layer {name} differs between rank 0 and rank(s) {odd}")


class DroppedEffects:
    """Looks at dropped filters from their drop to their return; ``cycle`` counts from 1."""

    def __init__(self, held: HeldFilters, cycle: int) -> None:
        self._held = held
        self._cycle = cycle
        self._steps = 0
        held.watch_channels()

    def look(self) -> None:
        """Raises UserError where dropped channels are not 0 in the first pass, or dropped filters after a step."""
        if self._held.saw_channels() and (leaking := self._held.leaking()):
            raise UserError(
                f"dropped channels of {', '.join(leaking)} are not 0 in the sub-network's first pass: something is "
                "added behind the conv or its norm; exclude these convs, and tell us of the network"
            )
        self._steps += 1
        is_power_of_2 = self._steps & (self._steps - 1) == 0
        if self._steps % _EVERY == 0 or (is_power_of_2 and self._steps < _EVERY):
            check_zero(self._held, f"{self._steps} steps after the drop of cycle {self._cycle}")


class ReturnedEffects:
    """Looks, after one more step, at the filters (M, ...) that a restore has ``given``; ``cycle`` counts from 1."""

    def __init__(self, held: HeldFilters, given: Mapping[str, Tensor], cycle: int) -> None:
        self._layers = [layer for layer in held.layers if layer.name in given]
        self._rows = held.rows
        self._norms = {name: weight.float().flatten(1).norm(dim=1) for name, weight in given.items()}
        self._cycle = cycle

    def look(self) -> None:
        """Raises UserError where they are gone."""
        weights = to_cpu([layer.weight.index_select(0, self._rows[layer.name]) for layer in self._layers])
        for layer, weight in zip(self._layers, weights, strict=True):
            gone = int((weight.float().flatten(1).norm(dim=1) < _GONE * self._norms[layer.name]).sum())
            if gone:
                raise UserError(
                    f"{gone} of {len(weight)} filters of {layer.name} are gone one step after they returned in cycle "
                    f"{self._cycle}: something besides the optimizers that RePr knows writes the weights, such as a "
                    "copy of them that an optimizer keeps"
                )
