"""Which layers learn: one that does not must not lose filters, which it could never learn again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from repr_det.method.distributed import broadcast_
from repr_det.method.layers import FilterLayer

# A head that got no example has a gradient of zeros; so many in a row are no accident.
_MANY = 10


class LearningLayers:
    """Remembers which layers have had a gradient that is not zero, and how many others had that was.

    Args:
        layers: all layers that take part.
        optimizers: hold their parameters.
    """

    def __init__(self, layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
        self._seen: set[str] = set()
        self._zeros: dict[str, int] = {}
        self._layers = list(layers)
        self._optimizers = optimizers
        self._handles = {
            layer.name: layer.weight.register_hook(lambda gradient, name=layer.name: self._see(name, gradient))
            for layer in self._layers
            if layer.weight.requires_grad
        }

    def state_dict(self) -> dict[str, Any]:
        return {"seen": sorted(self._seen), "zeros": dict(self._zeros)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._zeros = dict(state["zeros"])
        for name in state["seen"]:
            self._learns(name)

    def frozen(self) -> dict[str, str]:
        """Layer name -> why it does not learn now, the same on every rank.

        Learning rates count where one of them is not 0, missing gradients where some layer has had one: before the
        first step nothing is known.
        """
        rates = {x.name: self._rate(x) for x in self._layers}
        reasons = {}
        for name, layer in ((x.name, x) for x in self._layers):
            if not layer.weight.requires_grad:
                reasons[name] = "it does not require a gradient"
            elif not rates[name] and any(rates.values()):
                reasons[name] = "its learning rate is 0"
            elif name not in self._seen and self._seen and not 0 < self._zeros.get(name, 0) < _MANY:
                reasons[name] = "it has had no gradient"
        flags = torch.tensor([x.name in reasons for x in self._layers], device=self._layers[0].weight.device)
        broadcast_([flags])
        frozen = [x.name for x, flag in zip(self._layers, flags.tolist(), strict=True) if flag]
        return {name: reasons.get(name, "it does not learn on rank 0") for name in frozen}

    def _rate(self, layer: FilterLayer) -> float:
        rates = [
            float(group.get("lr", 1))
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if any(p is layer.weight for p in group["params"])
        ]
        return max(rates, default=0.0)

    def _see(self, name: str, gradient: Tensor) -> None:
        if gradient.count_nonzero():
            self._learns(name)
        else:
            self._zeros[name] = self._zeros.get(name, 0) + 1

    def _learns(self, name: str) -> None:
        self._seen.add(name)
        self._zeros.pop(name, None)
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.remove()
