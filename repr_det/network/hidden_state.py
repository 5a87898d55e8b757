"""State that modules keep outside their ``state_dict`` and change while they train: plain numbers and tensors.

Detectron2's RetinaNet and FCOS average their loss normalizer in such an attribute.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_LARGEST = 1_000_000  # elements: what is larger is a cache of activations
_ABSENT = object()


class HiddenState:
    """The numbers and tensors in plain attributes and non-persistent buffers of all modules of ``model``, as they are
    when it is made.

    Not seen: attributes of any other kind (lists, dicts, NumPy arrays, generators), tensors that belong to a graph or
    have more than 1,000,000 elements, and attributes that are removed later.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held = {module: dict(vars(module)) for module in model.modules()}
        self._found = {name: (value, _copy(value)) for name, value in attributes(model)}

    def changed(self) -> dict[str, Any]:
        """Attributes that have another value now, as "module:attribute" -> value (tensors on the CPU); loads under
        ``torch.load(weights_only=True)``."""
        now = dict(attributes(self.model))
        return {
            name: value.detach().cpu().clone() if torch.is_tensor(value) else value
            for name, value in now.items()
            if not _same(value, self._found.get(name, (None, _ABSENT))[1])
        }

    def put_back(self) -> None:
        """Undoes every change; attributes of other kinds that were set anew are set back, new ones removed."""
        for module, held in self._held.items():
            now = vars(module)
            for key in [key for key in now if key not in held]:
                del now[key]
            now.update({key: value for key, value in held.items() if key != "training"})
        with torch.no_grad():
            for value, copy in self._found.values():
                if torch.is_tensor(value):
                    value.copy_(copy)

    def load(self, changed: dict[str, Any]) -> list[str]:
        """Sets what ``changed`` of another process returned; the names that this model does not have."""
        unknown = []
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, value in changed.items():
            try:
                owner, attribute = self._owner(name)
            except AttributeError:
                unknown.append(name)
                continue
            if torch.is_tensor(value):
                held = getattr(owner, attribute, None)
                value = value.to(held.device if torch.is_tensor(held) else device)
            setattr(owner, attribute, value)
        return unknown

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        module, _, attribute = name.rpartition(":")
        return self.model.get_submodule(module), attribute


def attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """("module:attribute", value) of the numbers and tensors that ``HiddenState`` sees."""
    for name, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if key != "training"}
        held |= {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
        for key, value in held.items():
            if is_plain(value):
                yield f"{name}:{key}", float(value) if isinstance(value, float) else value


def is_plain(value: Any) -> bool:
    """Tells whether ``value`` is a number, None or a small tensor outside of any graph."""
    if torch.is_tensor(value):
        return value.grad_fn is None and not isinstance(value, nn.Parameter) and value.numel() <= _LARGEST
    return isinstance(value, (bool, int, float, type(None)))


def _copy(value: Any) -> Any:
    return value.detach().clone() if torch.is_tensor(value) else value


def _same(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.to(b.device), b))
    return type(a) is type(b) and not torch.is_tensor(a) and bool(a == b)
