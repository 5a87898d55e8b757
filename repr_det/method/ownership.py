"""Who holds a conv, and which layers learn."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer
from repr_det.network.steps import learning_rates

_OWNER = "repr_owner"


class Owner:
    """Marks convs as those of one RePrScheme; copies of the convs are free.

    Attributes:
        keeps: the scheme while filters are out; in the full phase one that is forgotten is out of the way.

    Raises:
        UserError: one of the convs belongs to another scheme.
    """

    def __init__(self, scheme: Any, layers: Sequence[FilterLayer]) -> None:
        self._scheme = weakref.ref(scheme)
        self.keeps: Any = None
        self._convs = [layer.conv for layer in layers]
        for layer in layers:
            other = vars(layer.conv).get(_OWNER)
            if isinstance(other, Owner) and other._scheme() is not None:
                out = other.keeps is not None
                raise UserError(
                    f"{layer.name} belongs to another RePr already: close() that one first"
                    + (", after finish() brings its filters back" if out else "")
                )
        for conv in self._convs:
            vars(conv)[_OWNER] = self

    def let_go(self) -> None:
        for conv in self._convs:
            if vars(conv).get(_OWNER) is self:
                del vars(conv)[_OWNER]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Learning:
    """Knows which layers learn: a filter that is dropped of one that does not could never come back as another."""

    def __init__(self, layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._seen: set[str] = set()
        self._handles: dict[str, Any] = {}
        for layer in layers:
            if layer.weight.requires_grad:
                self._handles[layer.name] = layer.weight.register_hook(self._hook_of(layer.name))

    def frozen(self, layers: Sequence[FilterLayer]) -> dict[str, str]:
        """Name of a layer that cannot learn now -> the reason; the same on every rank, for optimizers are."""
        held = learning_rates(self._optimizers)
        rates = {layer.name: held.get(layer.weight, 0.0) for layer in layers}
        still = [name for name, rate in rates.items() if not rate and any(rates.values())]
        fixed = [layer.name for layer in layers if not layer.weight.requires_grad]
        return dict.fromkeys(still, "its learning rate is 0") | dict.fromkeys(fixed, "it does not require a gradient")

    def without(self, layers: Sequence[FilterLayer]) -> dict[str, str]:
        """The same, and layers that have had no gradient where others have."""
        missing = [layer.name for layer in layers if self._seen and layer.name not in self._seen]
        return dict.fromkeys(missing, "it has had no gradient") | self.frozen(layers)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _hook_of(self, name: str) -> Any:
        def see(gradient: Tensor) -> None:
            self._seen.add(name)
            if name in self._handles:
                self._handles.pop(name).remove()

        return see
