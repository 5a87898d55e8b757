"""Averages of the weights (EMA, SWA) beside a model: dropped and returning filters are copied into them.

An average lags behind a drop and a restore: long after either it holds a mixture of a filter that is gone and one that
is new, which is neither. The rows that a transition writes are the same in the average from then on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer

# Where wrappers keep their model: torch's AveragedModel and timm's ModelEmaV3, Ultralytics' ModelEMA, hooks.
_INNER = ("module", "ema", "model", "ema_model", "averaged_model", "average")


class Averages:
    """The averages that follow a model.

    Args:
        models: modules with the parameters of ``model`` under the same names, or objects that hold one.
        model: not wrapped.

    Raises:
        UserError: one of them holds no such module.
    """

    def __init__(self, models: Sequence[Any], model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._models = [_module_in(one, model) for one in models]

    def copy_rows(self, layer: FilterLayer, rows: Tensor) -> None:
        """Makes rows (M,) of a layer, its norm and running statistics, those of the model."""
        for average in self._models:
            modules = dict(average.named_modules())
            for module in (layer.conv, layer.norm):
                if module is not None:
                    _copy(module, modules[self._names[module]], rows)

    @torch.no_grad()
    def copy_kernels(self, reader: nn.Module, within: slice, channels: Tensor) -> None:
        """Makes the weights of some filters of a conv or linear layer for some inputs those of the model."""
        for average in self._models:
            weight = average.get_submodule(self._names[reader]).weight[within]
            there = channels.to(weight.device)
            weight.index_copy_(1, there, reader.weight[within].index_select(1, channels).to(weight))


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, rows: Tensor) -> None:
    own: Mapping[str, Tensor] = {
        **dict(target.named_parameters(recurse=False)),
        **dict(target.named_buffers(recurse=False)),
    }
    for name, tensor in own.items():
        value = getattr(source, name, None)
        if isinstance(value, Tensor) and value.dim() and value.shape == tensor.shape:
            there = rows.to(tensor.device)
            tensor.index_copy_(0, there, value.detach().index_select(0, rows).to(tensor))


def _module_in(holder: Any, model: nn.Module) -> nn.Module:
    """The module of the same parameters: ``holder`` itself, or what it holds."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    waiting = [holder]
    for _ in range(4):
        found = []
        for one in waiting:
            if isinstance(one, nn.Module) and _has(one, wanted):
                return one
            found += [getattr(one, name) for name in _INNER if getattr(one, name, None) is not None]
        waiting = found
    raise UserError(
        f"averages= must be models with the parameters of the model that is trained, or hold one "
        f"({', '.join(_INNER)}), got {type(holder).__name__}"
    )


def _has(module: nn.Module, wanted: Mapping[str, torch.Size]) -> bool:
    own = {name: parameter.shape for name, parameter in module.named_parameters()}
    own |= {name: buffer.shape for name, buffer in module.named_buffers()}
    return all(own.get(name) == shape for name, shape in wanted.items())
